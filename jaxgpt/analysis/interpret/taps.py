"""Named taps: reads activations of any model, and replaces them.

`forward` runs a model as it is, layer after layer in the same scan, and returns the activations at
the taps that were asked for. An edit replaces an activation where a mask is true, as data: one
compiled program serves every head, layer and position.

          embed ─► resid_pre ─► norm ─► q·k ─► pattern ─► heads ─► o ─► attn_out ─┐
  a layer:             └──────────────────────────── + ◄─────────────────────────┘
                                                     │
                                                 resid_mid ─► norm ─► mlp_hidden ─► mlp_out ─┐
                       resid_post ◄─────────────────────────────────────────────── + ◄──────┘
  after the last:  resid_post = resid_final ─► norm ─► head

Attention is computed by definition (`attention.reference`), because kernels form no pattern. Its
results equal those of the kernels up to rounding.

B batch, T query position, S key position, D model, N heads, H head size, F feed-forward, L layers.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxgpt.errors import UserError, nearest
from jaxgpt.model import lora, stacks, transformer
from jaxgpt.model.attention import reference
from jaxgpt.model.block import Block, BlockInputs
from jaxgpt.tree import PyTree

# Taps of a layer, with the shape of their activations. `forward` puts an axis of layers in front.
OF_LAYERS = {
  "resid_pre": "[B, T, D] residual stream before the layer",
  "pattern": "[B, N, T, S] attention of each head; rows over S sum to 1",
  "heads": "[B, T, N, H] output of each head, before the projection to the residual stream",
  "attn_out": "[B, T, D] what attention adds to the residual stream",
  "resid_mid": "[B, T, D] residual stream between attention and MLP",
  "mlp_hidden": "[B, T, F] neurons of a dense MLP",
  "mlp_out": "[B, T, D] what the MLP or the experts add to the residual stream",
  "resid_post": "[B, T, D] residual stream after the layer",
}
OF_MODEL = {
  "embed": "[B, T, D] embeddings, with those of positions and types",
  "resid_final": "[B, T, D] residual stream before the final norm",
}
TAPS = OF_MODEL | OF_LAYERS


class Inputs(NamedTuple):
  """A batch as the model reads it.

  Attributes:
    tokens: Token ids [B, T].
    segments: [B, T], 1, 2, ... for the documents of a row, 0 for padding. None: one document.
    positions: [B, T], positions within each document. None: 0, 1, 2, ...
    token_types: [B, T], see `Transformer.__call__`, or None.
  """

  tokens: jax.Array
  segments: jax.Array | None = None
  positions: jax.Array | None = None
  token_types: jax.Array | None = None


class Edit(NamedTuple):
  """A replacement at a tap: value where mask is True, else the activation as it is.

  Attributes:
    mask: bool, broadcasts against the activations; at a tap of layers, with the axis of layers.
    value: The same, in the activations' units.
  """

  mask: Any
  value: Any


Edits = Mapping[str, Edit]


class Reading(NamedTuple):
  """What a model computed.

  Attributes:
    output: The model's output.
    at: {tap: activations}, with an axis of layers in front for taps of layers. It has
      the layers of `layers_with`: all, unless layers differ in their MLP.
  """

  output: transformer.Output
  at: dict[str, jax.Array]


def readable(model: transformer.Transformer) -> transformer.Transformer:
  """The same model with attention by definition, without rematerialization and dropout."""
  fields = model.cfg.to_dict() | dict(remat="none", attention="reference", dropout=0.0)
  return model.clone(cfg=ml_collections.FrozenConfigDict(fields), pipeline=None)


def merged(
  model: transformer.Transformer, params: PyTree
) -> tuple[transformer.Transformer, PyTree]:
  """A trained model, readable and as it answers requests, and its weights.

  LoRA adapters are merged into the weights they adapt, and experts drop no token.
  """
  model = readable(transformer.dropless(model))
  if not model.cfg.lora.rank:
    return model, params
  params = jax.jit(lora.merge, static_argnums=1)(params, model.cfg.lora)
  fields = model.cfg.to_dict()
  fields["lora"] = fields["lora"] | dict(rank=0)
  return model.clone(cfg=ml_collections.FrozenConfigDict(fields)), params


def layers_with(cfg: ml_collections.FrozenConfigDict, tap: str) -> list[int]:
  """Numbers of the layers that have a tap, in order. `cfg` is the config's `model` section."""
  layers, start = [], 0
  for stack in stacks.of(cfg):
    for i in range(stack.num_layers):
      _, mlp = stack.kinds[i % len(stack.kinds)]
      if tap in OF_LAYERS and _has(mlp, tap):
        layers.append(start + i)
    start += stack.num_layers
  return layers


def _has(mlp: str, tap: str) -> bool:
  """Whether layers with this kind of MLP have a tap."""
  return tap not in ("mlp_hidden", "mlp_out") or mlp == "dense" or (mlp, tap) == ("moe", "mlp_out")


def check(cfg: ml_collections.FrozenConfigDict, names: Sequence[str]) -> None:
  """Checks names of taps.

  Raises:
    UserError: There is no such tap, or the model has none of its layers.
  """
  for name in names:
    if name not in TAPS:
      raise UserError(
        f"tap {name!r} does not exist; {nearest(name, TAPS)}choose from {', '.join(TAPS)}"
      )
    if name in OF_LAYERS and not layers_with(cfg, name):
      raise UserError(f"tap {name!r}: no layer of this model has it; choose another tap")


def forward(
  model: transformer.Transformer,
  params: PyTree,
  inputs: Inputs,
  read: Sequence[str] = (),
  edits: Edits | None = None,
) -> Reading:
  """Runs a model, reads taps and applies edits. A pure function, for `jax.jit`, grad and vmap.

  Reading changes no output. If a tap is both edited and read, the reading is the edited value.

  Args:
    model: From `readable` or `merged`.
    params: All its parameters.
    inputs: The batch.
    read: Names of taps.
    edits: {tap: replacement}.

  Returns:
    The model's output and the activations.

  Raises:
    UserError: See `check`.
  """
  edits = dict(edits or {})
  check(model.cfg, [*read, *edits])
  recorder = _Recorder(frozenset(read), edits)
  positions = inputs.positions
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(inputs.tokens.shape[1]), inputs.tokens.shape)
  with nn.intercept_methods(recorder.intercept):
    output: Any = model.apply(
      {"params": params},
      inputs.tokens,
      positions,
      inputs.segments,
      token_types_BT=inputs.token_types,
    )
  return Reading(output, recorder.found)


# The same, compiled for each model and set of taps.
read = functools.partial(jax.jit, static_argnames=("model", "read"))(forward)


class _Recorder:
  """Stands between the modules of a model: collects readings and applies edits."""

  def __init__(self, read: frozenset[str], edits: dict[str, Edit]):
    self._read, self._edits = read, edits
    self._here = frozenset(OF_MODEL)  # the taps and the edits of the layer that is being traced
    self._now: Edits = edits
    self.found: dict[str, jax.Array] = {}

  def intercept(
    self,
    call: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    """An interceptor for `nn.intercept_methods`."""
    name = context.method_name
    if name == "tap":
      return self._tap(*args, **kwargs)
    if name == "mix":
      return self._mix(*args, **kwargs)
    if name == "_layers":
      return self._layers(context.module, *args, **kwargs)
    return call(*args, **kwargs)

  def _tap(self, name: str, x: jax.Array) -> jax.Array:
    if name not in self._here:  # such as the MLP of shared experts
      return x
    if name in self._now:
      mask, value = self._now[name]
      value = jnp.asarray(value, x.dtype)
      # A literal True lets XLA drop the computation of x.
      x = jnp.broadcast_to(value, x.shape) if mask is True else jnp.where(mask, value, x)
    if name in self._read:
      self.found[name] = x
    return x

  def _mix(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Any, _: Any, spec: Any) -> Any:
    """Attention by definition, with a tap between its two halves."""
    weights_BKGTS = reference.pattern(q, k, mask, scale=spec.scale, softcap=spec.softcap)
    B, K, G, T, S = weights_BKGTS.shape
    pattern_BNTS = self._tap("pattern", weights_BKGTS.reshape(B, K * G, T, S))
    return reference.weighted(pattern_BNTS.reshape(weights_BKGTS.shape), v)

  @contextlib.contextmanager
  def _layer(self, mlp: str, edits: Edits) -> Iterator[dict[str, jax.Array]]:
    """Collects the readings of one layer apart from the others."""
    outer, self.found, self._now = self.found, {}, edits
    self._here = frozenset(name for name in OF_LAYERS if _has(mlp, name))
    yield self.found
    self.found, self._now, self._here = outer, self._edits, frozenset(OF_MODEL)

  def _layers(self, module: Any, x: jax.Array, inputs: Any, *_: Any) -> tuple[Any, ...]:
    """Stands in for `Transformer._layers`: the same scan, which also carries readings out."""
    cfg, start, routers = module.cfg, 0, []
    found: dict[str, list[tuple[np.ndarray, Any]]] = {}
    for stack in stacks.of(cfg):
      period, numbers = len(stack.kinds), start + np.arange(stack.num_layers)
      of_block = [numbers[i::period] for i in range(period)]
      scanned = (
        module.variables["params"][stack.name],
        [jnp.asarray(of == 0) for of in of_block],
        [self._edits_of(cfg, of) for of in of_block],
      )
      x, (readings, router) = jax.lax.scan(
        functools.partial(self._period, module, stack, inputs), x, scanned
      )
      routers += [r for r in router if r is not None]
      for of, reading in zip(of_block, readings, strict=True):
        for name, values in reading.items():
          found.setdefault(name, []).append((of, values))
      start += stack.num_layers
    for name, parts in found.items():
      order = np.argsort(np.concatenate([of for of, _ in parts]))
      self.found[name] = jnp.concatenate([values for _, values in parts])[order]
    total = jax.tree.map(lambda *xs: sum(v.sum(0) for v in xs), *routers) if routers else None
    return x, None, total, None

  def _edits_of(self, cfg: Any, layers: np.ndarray) -> dict[str, Edit]:
    """The edits of some layers, whose leading axis a scan can go along."""
    out = {}
    for name, edit in self._edits.items():
      if name not in OF_LAYERS:
        continue
      having = layers_with(cfg, name)
      at = [having.index(i) for i in layers if i in having]
      if at:
        out[name] = Edit(*(_of_layers(v, len(having), name)[np.asarray(at)] for v in edit))
    return out

  def _period(self, module: Any, stack: stacks.Stack, inputs: Any, x: Any, scanned: Any) -> Any:
    """One repetition of a stack's pattern of layers, as `block.Period`."""
    params, is_first, edits = scanned
    readings, routers = [], []
    for i, kind in enumerate(stack.kinds):
      block: Any = Block(module.cfg, module.rules, kind, parent=None)
      own = BlockInputs(None, None if module.cfg.first_norm else is_first[i], None)
      mine = params if len(stack.kinds) == 1 else params[str(i)]
      with self._layer(kind[1], edits[i]) as reading:
        x, (_, router) = block.apply({"params": mine}, x, inputs, own)
      readings.append(reading)
      routers.append(router)
    return x, (readings, routers)


def _of_layers(v: Any, num_layers: int, name: str) -> jax.Array:
  """An edit's mask or value, with one entry for each layer."""
  v = jnp.asarray(v)
  v = v[None] if v.ndim == 0 else v
  if v.shape[0] not in (1, num_layers):
    raise UserError(
      f"edit of tap {name!r}: its first axis has {v.shape[0]} entries, but {num_layers} layers "
      f"have the tap; give it 1 or {num_layers}"
    )
  return jnp.broadcast_to(v, (num_layers, *v.shape[1:]))
