"""The one Transformer: a model family is a set of values of the config's `model` section.

No code branches on the name of a family.

B batch, T query position, D model, V vocabulary (or labels), E experts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxgpt import tree
from jaxgpt.model import layer_inputs, layers, ops, remat, stacks
from jaxgpt.model import pipeline as pipeline_lib
from jaxgpt.model.attention import paged, qk_clip, token_order
from jaxgpt.model.block import BlockInputs, Period
from jaxgpt.model.experts import router as router_lib
from jaxgpt.model.kv_cache import LayerCache, Pools
from jaxgpt.model.layer_inputs import LayerInputs
from jaxgpt.parallel.sharding import DEFAULT, Rules
from jaxgpt.tree import PyTree

# f(hidden states, weight [D, V], bias [V] or None): replaces the product of the head.
Project = Callable[[jax.Array, jax.Array, jax.Array | None], Any]


class Output(NamedTuple):
  """The results of a model call.

  Attributes:
    logits: float32 [B, T, V], or [B, V] with `logits_at_B` and for heads that pool.
    hidden: Hidden states [B, T, D] after the final norm.
    cache: The KV cache with this call's tokens, or None.
    router: Router statistics summed over the layers, see `experts.router`, None without experts.
    layers: Output of each block, [num_layers, B, T, D], if it was asked for, else None.
    largest_logits: {path of an attention layer: largest logits of its heads [L, N]} for QK-clip,
      which `objectives.apply` fills in, else None.
  """

  logits: Any
  hidden: jax.Array
  cache: Pools | None
  router: router_lib.Statistics | None
  layers: jax.Array | None
  largest_logits: dict[str, jax.Array] | None = None


class Transformer(layers.Module):
  """Maps tokens to logits.

  Attributes:
    cfg: The config's `model` section, resolved and frozen.
    pipeline: The pipeline that whole batches go through, or None.
    rules: Logical axis rules, which say how the mesh shards activations.
    largest_logits: Whether `objectives.apply` asks for the largest attention logits.
  """

  pipeline: pipeline_lib.Pipeline | None = None
  rules: Rules = DEFAULT
  largest_logits: bool = False

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    *,
    token_types_BT: jax.Array | None = None,
    cache: Pools | None = None,
    call: paged.Call | None = None,
    dropout_key: jax.Array | None = None,
    logits_at_B: jax.Array | None = None,
    layer_outputs: bool = False,
    balanced: bool = False,
    project: Project | None = None,
  ) -> Output:
    """Applies the model to a batch.

    Args:
      tokens_BT: Token ids.
      positions_BT: Positions within each document, below `max_len`.
      segment_ids_BT: 1, 2, ... for the documents of a packed row, 0 for padding. None: each row is
        one document. Not used with a cache.
      token_types_BT: 0 and 1 for the two texts of a pair, below `token_types`. None: all 0.
      cache: KV cache from `kv_cache.pools` or an earlier call, or None.
      call: Where the tokens are in the cache. Layers may then be apart, see `stacks.apart`.
      dropout_key: PRNG key during training, None otherwise.
      logits_at_B: For each row, the one index into T to compute logits at. None: all.
      layer_outputs: Whether to return the output of every block.
      balanced: Whether the tokens of a causal model are already in the order of
        `token_order.balance`, if the mesh shards rows. The results are then in that order too.
      project: Replaces the product of an 'lm' head: f(hidden states, float32 weight [D, V], bias
        [V] or None). Its result is returned as the logits.

    Returns:
      An `Output`.
    """
    cfg = self.cfg
    # Every key split below is part of the result of a seed: do not reorder.
    layers_key = None
    if dropout_key is not None and (cfg.dropout or cfg.lora.dropout):
      dropout_key, layers_key = jax.random.split(dropout_key)
    # Where the mesh shards the rows of a causal model, tokens are permuted once here and the
    # results are permuted back at the end. Positions and segments are permuted along.
    reorder = cfg.causal and call is None and not balanced
    if reorder:
      balance = token_order.balance
      tokens_BT, positions_BT = balance(tokens_BT), balance(positions_BT)
      segment_ids_BT, token_types_BT = balance(segment_ids_BT), balance(token_types_BT)
    table = self.weight("embed", (cfg.vocab_size, cfg.width), ("vocab", "embed"), cfg.init_std)
    # The table is gathered once, for the lookup and for a tied head. A lookup in a sharded table
    # would move activations instead.
    gathered = self.rules.constrain(table.astype(self.dtype), "act_vocab", "act_embed")
    x = (
      ops.widely_summed(table, gathered, tokens_BT)
      if self.has_wide_gradients
      else jnp.take(gathered, tokens_BT, axis=0)
    )
    x = self.tap("embed", self._embedded(x, positions_BT, token_types_BT))
    if layers_key is not None:
      x = ops.dropout(x, cfg.dropout, dropout_key)
    x = self.rules.constrain(x, "rows", "residual_length", "act_embed")
    if segment_ids_BT is None or call is not None:
      segment_ids_BT = jnp.ones_like(tokens_BT)
    inputs = layer_inputs.make(cfg, self.form, positions_BT, segment_ids_BT, call)
    x, cache, router, outputs = self._layers(x, inputs, cache, layers_key, layer_outputs)
    x = self.tap("resid_final", x)
    if cfg.norm_placement != "post":
      x = layers.Norm(cfg, cfg.norm, cfg.width, name="final_norm")(x)
    x = self.rules.constrain(x, "rows", "length", "act_embed")
    if reorder:
      x, inputs = token_order.restore(x), layer_inputs.restored(inputs)
      outputs = None if outputs is None else token_order.restore(outputs, 2)
    # Logits are large, [B, T, V], and decoding needs those of one token per row.
    at = x
    if logits_at_B is not None:
      at = jnp.take_along_axis(x, logits_at_B[:, None, None], axis=1)[:, 0]
    narrow = project is None and not self.has_wide_gradients
    logits = self._head(at, gathered if narrow else table, inputs, project)
    return Output(logits, x, cache, router, outputs)

  def _embedded(
    self, x: jax.Array, positions_BT: jax.Array, token_types_BT: jax.Array | None
  ) -> jax.Array:
    """Token embeddings [B, T, D], scaled, with position and type embeddings added, normalized."""
    cfg = self.cfg
    if cfg.embed_scale != 1:
      x *= jnp.asarray(cfg.embed_scale, self.dtype)
    axes = ("positions", "embed")
    if cfg.position == "learned":
      table = self.weight("pos_embed", (cfg.max_len, cfg.width), axes, cfg.init_std)
      x += jnp.take(table, positions_BT, axis=0).astype(self.dtype)
    if cfg.token_types:
      types = self.weight("type_embed", (cfg.token_types, cfg.width), axes, cfg.init_std)
      types = types.astype(self.dtype)
      if token_types_BT is not None and cfg.token_types > 1:
        x += jnp.take(types, token_types_BT, axis=0)
      else:  # RoBERTa has one type for both texts of a pair
        x += types[0]
    if cfg.embed_norm:
      x = layers.Norm(cfg, cfg.norm, cfg.width, name="embed_norm")(x)
    return x

  def _layers(
    self,
    x: jax.Array,
    inputs: LayerInputs,
    cache: Pools | None,
    key: jax.Array | None,
    layer_outputs: bool,
  ) -> tuple[jax.Array, Pools | None, router_lib.Statistics | None, jax.Array | None]:
    """Applies all stacks in order: (x, cache, router statistics, outputs of the blocks)."""
    cfg = self.cfg
    if inputs.call is not None:
      return *self._one_by_one(x, inputs, cache), None, None
    keys = None if key is None else jax.random.split(key, cfg.num_layers)
    routers, outputs, start = [], [], 0
    for stack in stacks.of(cfg):
      n, p = stack.repeats, len(stack.kinds)
      is_first = None if cfg.first_norm else jnp.arange(cfg.num_layers) == 0

      def of_block(v, i, start=start, n=n, p=p):
        """[num_layers, ...] -> [n, ...]: the entries of the layers that are block i of a period."""
        return None if v is None else v[start : start + n * p].reshape(n, p, *v.shape[1:])[:, i]

      own = tuple(
        BlockInputs(
          key=of_block(keys, i),
          cache=None,
          is_first=of_block(is_first, i),
        )
        for i in range(p)
      )
      if self.pipeline and not layer_outputs:
        x, router = self._pipelined(stack, own, x, inputs)
      else:
        period = self._scanned(stack)
        period = period(cfg, self.rules, stack.kinds, layer_outputs, name=stack.name)
        x, (_, router, out) = period(x, inputs, own)
        if layer_outputs:
          outputs.append(jnp.stack(out, 1).reshape(n * p, *x.shape))
      routers += [r for r in router if r is not None]
      start += n * p
    total = jax.tree.map(lambda *xs: sum(v.sum(0) for v in xs), *routers) if routers else None
    all_outputs = jnp.concatenate(outputs) if layer_outputs else None
    return x, None, total, all_outputs

  def _one_by_one(self, x: jax.Array, inputs: LayerInputs, pools: Any) -> tuple[jax.Array, Pools]:
    """Applies the layers to a paged cache, without a scan: (x, the cache).

    A scan would copy each layer's part of the cache, and on CPUs of the parameters, in each step.
    """
    pools, out = list(pools), list[LayerCache]()
    for stack in stacks.of(self.cfg):
      params = self.variables["params"][stack.name]
      period: Any = Period(self.cfg, self.rules, stack.kinds, False, parent=None)
      for i in range(stack.repeats):
        layer = stacks.repeat_of(params, i)
        own = tuple(
          BlockInputs(
            cache=pools.pop(0),
            is_first=None if self.cfg.first_norm else jnp.asarray(len(out) + j == 0),
            key=None,
          )
          for j in range(len(stack.kinds))
        )
        x, made = period.apply({"params": layer}, x, inputs, own)
        out += made.caches
    return x, tuple(out)

  def _pipelined(
    self, stack: stacks.Stack, own: tuple[BlockInputs, ...], x: jax.Array, inputs: LayerInputs
  ) -> tuple[jax.Array, tuple[router_lib.Statistics | None, ...]]:
    """Applies a stack on a mesh with stages: (x, router statistics of each block of the period)."""
    period: Any = Period(self.cfg, self.rules, stack.kinds, False, parent=None)

    def apply_layers(layers_K, x, sides, microbatch):
      inputs = layer_inputs.make(self.cfg, self.form, sides["positions"], sides["segments"])

      def one(x, layer):
        params, own = layer
        # Each microbatch draws its own dropout.
        keys = [b.key if b.key is None else jax.random.fold_in(b.key, microbatch) for b in own]
        own = [b._replace(key=key) for b, key in zip(own, keys, strict=True)]
        x, out = period.apply({"params": params}, x, inputs, own)
        return x, out.routers

      x, router = jax.lax.scan(one, x, layers_K, unroll=self._unroll(stack))
      return x, jax.tree.map(lambda v: v.sum(0, keepdims=True), router)

    layers_and_own = (self.variables["params"][stack.name], own)
    sides = {"positions": inputs.positions, "segments": inputs.segments}
    assert self.pipeline is not None
    if stack.name != stacks.PIPELINED:
      stages = self.pipeline.stages
      x, sums = pipeline_lib.spread(apply_layers, layers_and_own, x, sides, stages, self.rules)
    else:
      policy = remat.tick_policy(self.cfg.remat, self.pipeline.repeats)
      x, sums = pipeline_lib.run(
        apply_layers, layers_and_own, x, sides, self.pipeline, policy, self.rules
      )
    return self.rules.constrain(x, "rows", "residual_length", "act_embed"), sums

  def _unroll(self, stack: stacks.Stack) -> int:
    """Number of periods in one iteration of the scan."""
    return min(max(self.cfg.scan_unroll // len(stack.kinds), 1), stack.repeats)

  def _scanned(self, stack: stacks.Stack) -> Any:
    """`Period`, scanned over the layers of a stack."""
    return nn.scan(
      Period,
      variable_axes={"params": 0, qk_clip.LARGEST: 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, 0),
      length=stack.repeats,
      unroll=self._unroll(stack),
      metadata_params={nn.PARTITION_NAME: "layers"},
    )

  def _head(
    self, x: jax.Array, table_VD: jax.Array, inputs: LayerInputs, project: Project | None
  ) -> Any:
    """The result of `model.head`, from hidden states [B, T, D] or [B, D].

    `inputs` has the tokens in the order of x.
    """
    cfg = self.cfg
    if cfg.head == "none":
      return x
    if cfg.head in ("classifier", "pooler"):
      x = ops.pooled(x, cfg.pooling, inputs.positions, inputs.segments)
    x = self._transformed(x)
    if cfg.head == "pooler":
      return x.astype(jnp.float32)
    if cfg.output_scale != 1:
      x *= jnp.asarray(cfg.output_scale, x.dtype)
    size, axis = (cfg.vocab_size, "vocab") if cfg.head == "lm" else (cfg.num_labels, "labels")
    if cfg.head == "lm" and cfg.tie_embeddings:
      w = table_VD.T
    else:
      w = self.weight("head", (cfg.width, size), ("embed", axis), cfg.init_std)
    bias = self.vector("head_bias", (size,), (axis,)) if cfg.head_bias else None
    if project is not None:
      return project(x, w, bias)
    logits = self.times(x, w, 1, jnp.float32)
    if bias is not None:
      logits += bias
    return ops.softcap(logits, cfg.logit_softcap)

  def _transformed(self, x: jax.Array) -> jax.Array:
    """Applies BERT's dense layer between hidden states and logits (`model.head_transform`)."""
    cfg = self.cfg
    if cfg.head_transform == "none":
      return x
    w = self.weight("head_dense", (cfg.width, cfg.width), ("embed", "norm"), cfg.init_std)
    x = self.times(x, w, 1)
    if cfg.bias:
      x += self.vector("head_dense_bias", (cfg.width,), ("norm",)).astype(self.dtype)
    if cfg.head_transform == "tanh":
      return jnp.tanh(x)
    norm = layers.Norm(cfg, cfg.norm, cfg.width, name="head_norm")
    return norm(ops.ACTIVATIONS[cfg.activation](x))


def _is_box(x: Any) -> bool:
  return isinstance(x, nn.LogicallyPartitioned)


def _init_boxed(model: Transformer, key: jax.Array) -> PyTree:
  """Initial parameters, each in Flax's box that holds its logical axes."""
  # One token is too short for kernels. The choice of an implementation does not affect parameters.
  tokens = jnp.zeros((1, 1), jnp.int32)
  plain = ml_collections.FrozenConfigDict(model.cfg.to_dict() | {"attention": "reference"})
  model = model.clone(cfg=plain, pipeline=None)
  return model.init(key, tokens, tokens)["params"]


def init(model: Transformer, key: jax.Array) -> PyTree:
  """Initial parameters: a plain nested dict of float32 arrays."""
  return jax.tree.map(lambda box: box.value, _init_boxed(model, key), is_leaf=_is_box)


def abstract(model: Transformer) -> tuple[PyTree, PyTree]:
  """Shapes and logical axes of the parameters, without computing any.

  Returns:
    (shapes, axes): nested dicts of `ShapeDtypeStruct`s and of tuples of logical axes, such as
    ('layers', 'embed', 'heads', 'head_dim') for 'layers/attn/q'.
  """
  boxed = _abstract_boxed(ml_collections.FrozenConfigDict(model.cfg))
  return (
    jax.tree.map(lambda box: box.value, boxed, is_leaf=_is_box),
    jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=_is_box),
  )


@functools.lru_cache(maxsize=64)
def _abstract_boxed(cfg: ml_collections.FrozenConfigDict) -> PyTree:
  """Shapes in boxes. A start of a run needs them several times, and tracing a model takes long."""
  return jax.eval_shape(lambda: _init_boxed(Transformer(cfg), jax.random.key(0)))


def dropless(model: Transformer) -> Transformer:
  """The model whose experts drop no token, for uses that answer requests.

  Training's limits (`moe.capacity`, `moe.buffer`) hold for all tokens of a row or of a device. With
  them an answer would depend on the requests that are computed with it, and on its row's padding.
  """
  moe = model.cfg.moe
  if not moe.capacity and not moe.buffer:
    return model
  fields = model.cfg.to_dict()
  fields["moe"] |= dict(capacity=0.0, buffer=0.0)
  return model.clone(cfg=ml_collections.FrozenConfigDict(fields))


def depths(cfg: ml_collections.FrozenConfigDict, params: PyTree) -> PyTree:
  """The layer number of each parameter.

  Args:
    cfg: The config's `model` section.
    params: Tree of arrays or `ShapeDtypeStruct`s.

  Returns:
    The same tree: -1 for embeddings, num_layers - 1 for parameters after the layers, and for a
    stacked parameter an array of layer numbers.
  """
  first, layers_before = {}, 0
  for stack in stacks.of(cfg):
    first[stack.name] = (layers_before, len(stack.kinds))
    layers_before += stack.num_layers

  def one(path, leaf):
    keys = path.split("/")
    if keys[0] in first:
      start, period = first[keys[0]]
      return start + (int(keys[1]) if period > 1 else 0) + period * np.arange(leaf.shape[0])
    return -1 if "embed" in keys[0] else cfg.num_layers - 1

  return tree.map_named(one, params)
