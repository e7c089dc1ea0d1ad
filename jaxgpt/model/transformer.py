"""The one Transformer. Families are values of the config's `model` section; no code asks a name.

B batch, T query position, S cache slot, D model, V vocabulary (or labels), E experts.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxgpt import tree
from jaxgpt.model import layers, moe, ops, remat, rope, stacks
from jaxgpt.model import pipeline as pipeline_lib
from jaxgpt.model.attention import attention, context_parallel
from jaxgpt.parallel.sharding import DEFAULT, Rules


class Output(NamedTuple):
  """What the model computes from a batch.

  Attributes:
    logits: float32 [B, T, V], or [B, V] with `logits_at_B` and for the heads that pool.
    hidden: [B, T, D] after the last norm.
    cache: the filled cache, or None.
    router: `moe.statistics` and 'dropped', summed over the layers; None without experts.
    layers: [num_layers, B, T, D], the output of each block, where it was asked for.
  """

  logits: Any
  hidden: Any
  cache: Any
  router: Any
  layers: Any


class Block(layers.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), with the norms where `norm_placement` says."""

  rules: Rules
  kind: tuple

  @nn.compact
  def __call__(self, x_BTD, shared, layer):
    cfg = self.cfg
    kind, mlp = self.kind
    key = layer["key"]
    keys = (None, None) if key is None else jax.random.split(key)
    lora_key = key if key is not None and cfg.lora.dropout else None

    def attend(y):
      attention_of = layers.Attention(cfg, self.rules, kind, name="attn")
      return attention_of(y, shared, layer["cache"], lora_key)

    def feed(y):
      if mlp == "moe":
        return moe.MoE(cfg, self.rules, name="mlp")(y, shared["real"], lora_key)
      return layers.MLP(cfg, self.rules, cfg.mlp_width, name="mlp")(y, lora_key), None

    x_BTD, cache = self._branch("attn", x_BTD, attend, keys[0], layer.get("is_first"))
    x_BTD, router = self._branch("mlp", x_BTD, feed, keys[1])
    return x_BTD, (cache, router)

  def _branch(self, name, x_BTD, f, key, skip_norm=None):
    """A residual branch; `skip_norm` is a traced bool that takes its input as it is."""
    cfg = self.cfg
    norm = lambda suffix: layers.Norm(cfg, cfg.norm, cfg.width, name=f"{name}{suffix}")
    y = x_BTD
    if cfg.norm_placement in ("pre", "both"):
      y = ops.materialized(norm("_norm")(y), cfg.materialize)
      if skip_norm is not None:
        y = jnp.where(skip_norm, x_BTD, y)
    y, extra = f(y)
    if cfg.norm_placement in ("branch", "both"):
      y = norm("_post_norm")(y)
    x_BTD += ops.dropout(y, cfg.dropout, key)
    if cfg.norm_placement == "post":
      x_BTD = norm("_norm")(x_BTD)
    return self.rules.constrain(x_BTD, "batch", "residual_length", "act_embed"), extra


class Period(layers.Module):
  """The blocks of one repetition of the layers' pattern."""

  rules: Rules
  kinds: tuple
  layer_outputs: bool

  @nn.compact
  def __call__(self, x_BTD, shared, layer):
    """Args: layer: for each block its key, cache and so on. Returns: (x_BTD, a tuple of each)."""
    block = Block
    if self.cfg.remat != "none":
      block = nn.remat(Block, policy=remat.policy(self.cfg.remat), prevent_cse=self._is_unrolled())
    out = []
    for i, (kind, of_block) in enumerate(zip(self.kinds, layer, strict=True)):
      one = block(self.cfg, self.rules, kind, name=str(i))
      if len(self.kinds) == 1:  # 'layers/attn/q' and not 'layers/0/attn/q'
        nn.share_scope(self, one)
      x_BTD = checkpoint_name(x_BTD, remat.INPUT)
      x_BTD, (cache, router) = one(x_BTD, shared, of_block)
      out.append((cache, router, x_BTD if self.layer_outputs else None))
    return x_BTD, tuple(zip(*out, strict=True))

  def _is_unrolled(self):
    return self.cfg.scan_unroll * len(self.kinds) >= self.cfg.num_layers


class Transformer(layers.Module):
  """Tokens to logits.

  Attributes:
    cfg: the config's `model` section, resolved and frozen.
    pipeline: a `pipeline.Pipeline` that whole batches go through, or None.
    rules: how a mesh cuts what is computed.
  """

  pipeline: pipeline_lib.Pipeline | None = None
  rules: Rules = DEFAULT

  @nn.compact
  def __call__(
    self,
    tokens_BT,
    positions_BT,
    segment_ids_BT=None,
    *,
    token_types_BT=None,
    cache=None,
    dropout_key=None,
    logits_at_B=None,
    layer_outputs=False,
    balanced=False,
    project=None,
  ):
    """Applies the model to a batch.

    Args:
      tokens_BT: token ids.
      positions_BT: positions within each document, below `max_len`. With a cache also the slots
        that this call fills; those of a row must then be consecutive.
      segment_ids_BT: 1, 2, … for the documents of a packed row, 0 for padding; None: one document
        a row. Not used with a cache.
      token_types_BT: 0 and 1 for the two texts of a pair, below `token_types`; None: all 0.
      cache: from `init_cache` or an earlier call, or None.
      dropout_key: PRNG key while training, None otherwise.
      logits_at_B: for each row the one index into T whose logits are wanted; None: all.
      layer_outputs: whether the output of every block is wanted too.
      balanced: whether the caller has put the tokens of a causal model in the order of
        `context.balance`, where the mesh cuts rows, and wants what follows from them in that order.
      project: of an 'lm' head, what takes the place of its product:
        f(hidden states, float32 weight [D, V], bias [V] or None), whose result stands for logits.

    Returns:
      An `Output`.
    """
    cfg = self.cfg
    layers_key = None
    if dropout_key is not None and (cfg.dropout or cfg.lora.dropout):
      dropout_key, layers_key = jax.random.split(dropout_key)
    reorder = cfg.causal and cache is None and not balanced
    if reorder:
      tokens_BT, positions_BT, segment_ids_BT, token_types_BT = map(
        context_parallel.balance, (tokens_BT, positions_BT, segment_ids_BT, token_types_BT)
      )
    table = self.weight("embed", (cfg.vocab_size, cfg.width), ("vocab", "embed"), cfg.init_std)
    # Gathered once, for the lookup and for a tied head; a lookup in shards would move activations.
    gathered = self.rules.constrain(table.astype(self.dtype), "act_vocab", "act_embed")
    x = (
      ops.widely_summed(table, gathered, tokens_BT)
      if self.has_wide_gradients
      else jnp.take(gathered, tokens_BT, axis=0)
    )
    x = self._embedded(x, positions_BT, token_types_BT)
    if layers_key is not None:
      x = ops.dropout(x, cfg.dropout, dropout_key)
    x = self.rules.constrain(x, "rows", "residual_length", "act_embed")
    if segment_ids_BT is None or cache is not None:
      segment_ids_BT = jnp.ones_like(tokens_BT)
    shared = self._shared(positions_BT, segment_ids_BT, cache)
    x, cache, router, outputs = self._layers(x, shared, cache, layers_key, layer_outputs)
    if cfg.norm_placement != "post":
      x = layers.Norm(cfg, cfg.norm, cfg.width, name="final_norm")(x)
    x = self.rules.constrain(x, "rows", "length", "act_embed")
    real = shared["real"]
    if reorder:
      x, real = context_parallel.restore(x), context_parallel.restore(real)
      outputs = None if outputs is None else context_parallel.restore(outputs, 2)
    at = x
    if logits_at_B is not None:
      at = jnp.take_along_axis(x, logits_at_B[:, None, None], axis=1)[:, 0]
    narrow = project is None and not self.has_wide_gradients
    logits = self._head(at, gathered if narrow else table, real, project)
    return Output(logits, x, cache, router, outputs)

  def _embedded(self, x, positions_BT, token_types_BT):
    cfg = self.cfg
    if cfg.embed_scale != 1:
      x *= jnp.asarray(cfg.embed_scale, self.dtype)
    if cfg.position == "learned":
      places = self.weight(
        "pos_embed", (cfg.max_len, cfg.width), ("positions", "embed"), cfg.init_std
      )
      x += jnp.take(places, positions_BT, axis=0).astype(self.dtype)
    if cfg.token_types:
      types = self.weight(
        "type_embed", (cfg.token_types, cfg.width), ("positions", "embed"), cfg.init_std
      ).astype(self.dtype)
      x += types[0] if token_types_BT is None else jnp.take(types, token_types_BT, axis=0)
    if cfg.embed_norm:
      x = layers.Norm(cfg, cfg.norm, cfg.width, name="embed_norm")(x)
    return x

  def _shared(self, positions_BT, segments, cache=None):
    """What layers read: masks and rotary angles by kind of attention, the positions."""
    cfg = self.cfg
    if cache is not None:
      length = jax.tree.leaves(cache)[0].shape[2]
      mask = lambda window: ops.visible_slots(positions_BT, length, window=window)
    else:
      length = positions_BT.shape[1]
      mask = lambda window: (
        ops.visible(segments, causal=cfg.causal, window=window)
        if attention.needs_mask(self.form, length)
        else None
      )
    shared = {"positions": positions_BT, "segments": segments, "real": segments != 0}
    for kind in sorted(set(cfg.attention_pattern)):
      local = kind == "local"
      rotary = None
      if cfg.position == "rotary" and kind != "nope":
        own = local and cfg.rope.local_theta is not None
        rotary = rope.angles(
          positions_BT,
          rotated_size(cfg),
          cfg.rope,
          cfg.rope.local_theta if own else cfg.rope.theta,
          "none" if own else cfg.rope.scaling,
          length,
        )
      shared[kind] = {"mask": mask(cfg.window if local else None), "rotary": rotary}
    return shared

  def _layers(self, x, shared, cache, key, layer_outputs):
    """All stacks: (x, cache, router's sums, layers' outputs)."""
    cfg = self.cfg
    keys = None if key is None else jax.random.split(key, cfg.num_layers)
    caches, routers, outputs, at = {}, [], [], 0
    for stack in stacks.of(cfg):
      here = {
        "key": keys,
        "cache": cache and cache[stack.name],
        "is_first": None if cfg.first_norm else jnp.arange(cfg.num_layers) == 0,
      }
      n, p = stack.repeats, len(stack.kinds)
      part = lambda v, at=at, n=n, p=p: v[at : at + n * p].reshape(n, p, *v.shape[1:])
      of_blocks = tuple(
        {
          "key": None if keys is None else part(keys)[:, i],
          "cache": here["cache"] and here["cache"][i],
          "is_first": None if here["is_first"] is None else part(here["is_first"])[:, i],
        }
        for i in range(p)
      )
      if self.pipeline and cache is None and not layer_outputs:
        x, router = self._piped(stack, of_blocks, x, shared)
        filled = None
      else:
        x, (filled, router, out) = self._scanned(stack)(
          cfg, self.rules, stack.kinds, layer_outputs, name=stack.name
        )(x, shared, of_blocks)
      caches[stack.name] = filled
      routers += [r for r in router if r is not None]
      if layer_outputs:
        outputs.append(jnp.stack(out, 1).reshape(n * p, *x.shape))
      at += n * p
    total = jax.tree.map(lambda *xs: sum(v.sum(0) for v in xs), *routers) if routers else None
    return (
      x,
      None if cache is None else caches,
      total,
      jnp.concatenate(outputs) if layer_outputs else None,
    )

  def _piped(self, stack, of_blocks, x, shared):
    """A stack on a mesh with stages: (x, for each block the router's sums of its layers)."""
    period = Period(self.cfg, self.rules, stack.kinds, False, parent=None)

    def turn(layers_K, x, rows, number):
      shared = self._shared(rows["positions"], rows["segments"])

      def one(x, layer):
        params, of_blocks = layer
        keys = [
          b["key"] if b["key"] is None else jax.random.fold_in(b["key"], number) for b in of_blocks
        ]
        of_blocks = [b | {"key": key} for b, key in zip(of_blocks, keys, strict=True)]
        x, (_, router, _) = period.apply({"params": params}, x, shared, of_blocks)
        return x, router

      x, router = jax.lax.scan(one, x, layers_K, unroll=self._unroll(stack))
      return x, jax.tree.map(lambda v: v.sum(0, keepdims=True), router)

    own = (self.variables["params"][stack.name], of_blocks)
    rows = {name: shared[name] for name in ("positions", "segments")}
    if stack.name != stacks.PIPED:
      x, sums = pipeline_lib.spread(turn, own, x, rows, self.pipeline.stages, self.rules)
    else:
      policy = remat.tick_policy(self.cfg.remat, self.pipeline.repeats)
      x, sums = pipeline_lib.run(turn, own, x, rows, self.pipeline, policy, self.rules)
    return self.rules.constrain(x, "rows", "residual_length", "act_embed"), sums

  def _unroll(self, stack):
    return min(max(self.cfg.scan_unroll // len(stack.kinds), 1), stack.repeats)

  def _scanned(self, stack):
    return nn.scan(
      Period,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, 0),
      length=stack.repeats,
      unroll=self._unroll(stack),
      metadata_params={nn.PARTITION_NAME: "layers"},
    )

  def _head(self, x, table_VD, real_BT, project):
    """The logits, or what else `head` names, of hidden states [B, T, D] or [B, D]."""
    cfg = self.cfg
    if cfg.head == "none":
      return x
    if cfg.head != "lm":
      x = x[:, 0] if cfg.pooling == "first" else ops.mean_of(x, real_BT)
    x = self._transformed(x)
    if cfg.head == "pooler":
      return x.astype(jnp.float32)
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

  def _transformed(self, x):
    """What BERT does to hidden states before they become logits: a layer of their own."""
    cfg = self.cfg
    if cfg.head_transform == "none":
      return x
    w = self.weight("head_dense", (cfg.width, cfg.width), ("embed", "norm"), cfg.init_std)
    x = self.times(x, w, 1)
    if cfg.bias:
      x += self.vector("head_dense_bias", (cfg.width,), ("norm",)).astype(self.dtype)
    if cfg.head_transform == "tanh":
      return jnp.tanh(x)
    return layers.Norm(cfg, cfg.norm, cfg.width, name="head_norm")(
      ops.ACTIVATIONS[cfg.activation](x)
    )


def rotated_size(cfg):
  """How many entries of a head the rotary embedding turns."""
  return cfg.latent.rope_dim if cfg.latent.kv_rank else int(cfg.head_dim * cfg.rope.fraction)


def _is_box(x):
  return isinstance(x, nn.LogicallyPartitioned)


def _init_boxed(model, key):
  tokens = jnp.zeros((1, 1), jnp.int32)  # too short for kernels, whose choice makes no parameter
  plain = ml_collections.FrozenConfigDict(model.cfg.to_dict() | {"attention": "reference"})
  model = model.clone(cfg=plain, pipeline=None)
  return model.init(key, tokens, tokens)["params"]


def init(model, key):
  """Initial parameters: a plain nested dict of arrays."""
  return jax.tree.map(lambda box: box.value, _init_boxed(model, key), is_leaf=_is_box)


def abstract(model):
  """Shapes and logical axes of the parameters, without computing any.

  Returns:
    (shapes, axes): nested dicts of `ShapeDtypeStruct`s and of tuples of logical axes, such as
    ('layers', 'embed', 'heads', 'head_dim') for 'layers/attn/q'.
  """
  boxed = jax.eval_shape(lambda: _init_boxed(model, jax.random.key(0)))
  return (
    jax.tree.map(lambda box: box.value, boxed, is_leaf=_is_box),
    jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=_is_box),
  )


def depths(cfg, params):
  """The layer that each parameter belongs to.

  Args:
    cfg: the config's `model` section.
    params: tree of arrays or `ShapeDtypeStruct`s.

  Returns:
    The same tree: -1 for embeddings, num_layers - 1 for what follows the layers, and for a
    stacked parameter an array of the layers' numbers.
  """
  first, layers_before = {}, 0
  for stack in stacks.of(cfg):
    first[stack.name] = (layers_before, len(stack.kinds))
    layers_before += stack.num_layers

  def one(path, leaf):
    parts = path.split("/")
    if parts[0] in first:
      start, period = first[parts[0]]
      return start + (int(parts[1]) if period > 1 else 0) + period * np.arange(leaf.shape[0])
    return -1 if "embed" in parts[0] else cfg.num_layers - 1

  return tree.map_named(one, params)


def init_cache(cfg, batch_size, num_slots):
  """An empty cache for `num_slots` tokens a row: {stack: (a layer's cache, stacked, …)}."""
  one = layers.empty_cache(cfg, batch_size, num_slots)
  stacked = lambda n: jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), one)
  return {s.name: tuple(stacked(s.repeats) for _ in s.kinds) for s in stacks.of(cfg)}
