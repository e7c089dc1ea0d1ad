"""Memory of a train step by arithmetic: the arrays on one device, and how many live at once.

The search prunes by it, and a program that does not fit is explained with it. Compiled figures
decide. How far the arithmetic is from them is in `docs/benchmarks.md`.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import ml_collections

from jaxgpt.config.keys.layer_kinds import mlp_kinds
from jaxgpt.config.remat import INPUT, activations
from jaxgpt.model import fixed_models, stacks
from jaxgpt.model.attention import batched
from jaxgpt.model.quantization import quantized_base
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel.chips import Chip
from jaxgpt.plan import per_device
from jaxgpt.plan import topology as topology_lib
from jaxgpt.plan.per_device import Counts, Share
from jaxgpt.plan.schedule import estimate
from jaxgpt.plan.topology import Topology
from jaxgpt.training import build, objectives, optimizers


class Buffer(NamedTuple):
  """An array, or a group of arrays, that takes memory on a device.

  Attributes:
    name: Its place in the model.
    kind: When it lives: 'saved', 'layers', 'logits', 'head', 'layer', 'gradients', 'fixed',
      'parameters' or 'optimizer'. See `peak`.
    shape: Its shape on one device, as text.
    bytes: Its size.
    keys: Config keys that make it smaller, as text.
  """

  name: str
  kind: str
  shape: str
  bytes: float
  keys: str


_FEWER_TOKENS = "data.batch_size (fewer rows), optim.accumulate (more microbatches)"
_MORE_SHARDS = "mesh.fsdp, mesh.tensor"
_FEWER_PAIRS = f"model.attention, mesh.tensor; {_FEWER_TOKENS}"
_PAIRS = "layers/attn (logits and weights)"


def buffers(
  c: ml_collections.ConfigDict,
  sizes: Mapping[str, int],
  counts: Counts,
  chip: Chip | None = None,
  form: str | None = None,
) -> list[Buffer]:
  """The buffers of a step on one device, largest first. `peak` says which live at the same time.

  Args:
    c: A resolved config.
    sizes: Sizes of the mesh axes, {axis: size}.
    counts: The model's weights, from `per_device.count`.
    chip: The chip, which attention depends on. None: this machine's devices.
    form: The implementation of attention. None: what `model.attention` stands for on the chip.

  Raises:
    UserError: The layers or the rows do not divide into the pipeline stages, or the chip cannot run
      `model.attention`.
  """
  form = form or build.attention_form(c, topology_lib.platform(chip))
  found = [
    *_saved_activations(c, sizes, form),
    *_head_buffers(c, sizes),
    *_layer_buffers(c, sizes, counts),
    *_attention_buffers(c, sizes, chip, form),
    *_state_buffers(c, sizes, counts),
  ]
  return sorted(found, key=lambda b: -b.bytes)


def _state_buffers(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], counts: Counts
) -> Iterator[Buffer]:
  """The training state, gradients, and the copy of the weights that is gathered."""
  itemsize = per_device.itemsize(c.model)
  yield Buffer(
    "parameters",
    "parameters",
    f"{counts.all:,} in {'codes and ' if c.model.lora.base in quantized_base.BITS else ''}float32",
    counts.held_bytes(sizes),
    _MORE_SHARDS,
  )
  yield from _fixed_models(c, sizes, counts)
  trained = 4 * counts.held(sizes, trained=True)
  per_parameter = optimizers.find(c).bytes_per_parameter(c.optim)
  yield Buffer(
    "opt",
    "optimizer",
    f"{per_parameter:g} bytes per parameter",
    trained / 4 * per_parameter,
    "mesh.fsdp, optim.name, optim.first_dtype, optim.second_dtype",
  )
  if c.optim.ema:
    yield Buffer("ema", "optimizer", "1 per parameter", trained, "mesh.fsdp, optim.ema=0")
  copies = 2 if c.optim.accumulate > 1 else 1
  yield Buffer(
    "gradients", "gradients", f"{copies:g} per parameter", trained * copies, _MORE_SHARDS
  )
  if itemsize < 4:  # cast before the loop over the layers, to halve the bytes that are gathered
    yield Buffer(
      "layers (weights as they are gathered)",
      "layers",
      "shards",
      itemsize * counts.cast_of_layers(sizes),
      _MORE_SHARDS,
    )


def _fixed_models(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], counts: Counts
) -> Iterator[Buffer]:
  """The weights that the loss compares the model with, see `model.fixed_models`."""
  keys = f"objective.stored; {_MORE_SHARDS}"
  for name, one in per_device.fixed(c).items():
    theirs, itemsize = counts, per_device.itemsize(one.model)
    # The reference of adapters is the model without them.
    shared = name == fixed_models.REFERENCE and c.model.lora.rank > 0
    if name == fixed_models.TEACHER:
      theirs = per_device.count(one)
      held = theirs.held_bytes(sizes)
      yield Buffer(name, "parameters", f"{theirs.all:,} in float32", held, keys)
    elif not shared:
      held = 4 * counts.held(sizes, trained=True)
      yield Buffer(name, "parameters", "1 per trained parameter", held, keys)
    size = theirs.layer_bytes(sizes, one.model.num_layers, itemsize)
    if itemsize < 4 and not shared:
      size += itemsize * theirs.cast_of_layers(sizes)
    yield Buffer(f"{name} (weights as they are gathered)", "fixed", "shards, a layer", size, keys)


def _saved_activations(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], form: str
) -> Iterator[Buffer]:
  """Activations of all layers that the forward pass saves for the backward pass."""
  m, s = c.model, per_device.share(c, sizes)
  itemsize, rows = per_device.itemsize(m), f"{s.kept * s.rows:g},{s.length:g}"
  layers = m.num_layers + _idle_layers(c, sizes)
  each = layers * s.kept * s.rows * s.length

  def one(name: str, width: float, size: int, keys: str = _FEWER_TOKENS) -> Buffer:
    shape = f"[{layers:g},{rows},{width:g}]"
    return Buffer(name, "saved", shape, each * width * size, keys)

  if INPUT not in activations(m.remat).offloaded:
    yield one("layers (input of each)", m.width / s.residual, itemsize)
  names = per_device.saved_names(m.remat)
  routed = s.routed * per_device.grouped_room(c, sizes)
  inside = per_device.widths(m, routed, padded=True)["up"]
  widths = per_device.widths(m, per_device.kept_rows(m, routed), padded=True)
  for name in names:
    if name == "down" and m.norm_placement == "pre":
      continue  # only added to the residual stream: no gradient needs it, and XLA drops it
    where = "mlp" if name in ("gate", "up", "down") else "attn"
    yield one(
      f"layers/{where}/{name}",
      widths[name] / s.shards(name),
      itemsize,
      f"model.remat without {name!r}; {_FEWER_TOKENS}",
    )
  if "attention" in names:
    yield one("layers/attn (statistics)", m.num_heads / s.heads, 4)
  if pair := _saved_pair_bytes(c, sizes, form):
    heads = m.num_heads / s.heads
    shape, size = f"[{layers:g},{rows},{heads:g},{s.length:g}]", each * heads * s.length * pair
    yield Buffer(_PAIRS, "saved", shape, size, _FEWER_PAIRS)
  if m.remat == "none":
    yield one(
      "layers (norms, activations)",
      _unnamed_width(m, s, inside),
      itemsize,
      "model.remat=save:q,k,v,attention,gate,up",
    )


def _idle_layers(c: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> float:
  """Layers whose activations a pipeline saves in ticks in which a stage idles, as if it did not."""
  pipe = stacks.pipeline_of(c, sizes)
  if pipe is None:
    return 0.0
  layers = sum(one.num_layers for one in stacks.of(c.model) if one.name == stacks.PIPELINED)
  return layers * (pipe.ticks / (pipe.repeats * pipe.microbatches) - 1)


def _unnamed_width(m: ml_collections.ConfigDict, s: Share, hidden: float) -> float:
  """Numbers per token and layer that autodiff saves without a name, in addition to the input.

  Args:
    m: The `model` section.
    s: From `per_device.share`.
    hidden: Numbers per token within the MLP of a layer.
  """
  # The result of each norm. For RMSNorm also its input and two products, in float32.
  norms = m.width * (2 + 6 * (4 / per_device.itemsize(m) if m.norm == "rmsnorm" else 0))
  # The input of the matmul with o. In the MLP the activation, its derivative and products.
  mlp = (4 if m.gated else 1) * hidden / s.mlp
  return norms + per_device.all_heads(m) / s.heads + mlp


def _head_buffers(c: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> Iterator[Buffer]:
  """Buffers of the output head, for one microbatch."""
  m, s, itemsize = c.model, per_device.share(c, sizes), per_device.itemsize(c.model)
  if m.head != "lm":
    return
  n = s.kept * s.rows
  vocab, tokens, rows = m.vocab_size / s.vocab, n * s.length, f"{n:g},{s.length:g}"
  weight = m.width * vocab
  yield Buffer(
    "final_norm (input, result, gradient)",
    "logits",
    f"[{rows},{m.width}]",
    tokens * m.width * (2 * itemsize + 4),
    _FEWER_TOKENS,
  )
  if 0 < c.objective.loss_chunk < tokens:
    tokens, rows = c.objective.loss_chunk, f"{c.objective.loss_chunk}"
    # Computed together with the loss. It is scattered before the layers' backward pass, or, if the
    # table of embeddings is the head, after it, together with the gradient of the lookup.
    yield Buffer(
      "head/weight (gathered, and gradient)",
      "logits" if m.tie_embeddings else "head",
      f"[{m.width},{vocab:g}]",
      weight * (4 + itemsize),
      "mesh.tensor",
    )
    if not m.tie_embeddings:
      yield Buffer(
        "head/weight (gradient of this device)",
        "head",
        f"[{m.width / sizes['fsdp']:g},{vocab:g}]",
        weight * 4 / sizes["fsdp"],
        _MORE_SHARDS,
      )
    kind = "head"
  else:
    # XLA computes the gradient of the head's weight at once (v5e, v6e), or after the layers'
    # backward pass (v5p), and then the logits live that long. This estimate does not know the
    # chip, so it counts both.
    yield Buffer(
      "head/weight (gradient)", "head", f"[{m.width},{vocab:g}]", weight * 4, "mesh.tensor"
    )
    kind = "logits"
  yield Buffer(
    "head/logits",
    kind,
    f"[{rows},{vocab:g}]",
    tokens * vocab * 4,
    f"objective.loss_chunk, mesh.tensor; {_FEWER_TOKENS}",
  )
  if objectives.find(c).fixed(c):  # compared with the model's own
    yield Buffer(
      "head/logits of the fixed model",
      "head",
      f"[{rows},{vocab:g}]",
      tokens * vocab * 4,
      f"objective.stored; {_FEWER_TOKENS}",
    )


def _layer_buffers(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], counts: Counts
) -> Iterator[Buffer]:
  """Buffers of one layer's backward pass: gathered weights, and activations with gradients."""
  m, s = c.model, per_device.share(c, sizes)
  routed = s.routed * per_device.grouped_room(c, sizes)
  itemsize, w = per_device.itemsize(m), per_device.widths(m, routed, padded=True)
  yield Buffer(
    "layers (gathered)",
    "layer",
    "one layer",
    counts.layer_bytes(sizes, m.num_layers, itemsize),
    "mesh.tensor, mesh.expert" if "moe" in mlp_kinds(m) else "mesh.tensor",
  )
  # Queries, keys, values, the output of attention and the inside of the MLP, with gradients.
  each = 2 * (w["q"] + w["k"] + w["v"] + w["attention"]) / s.heads + 4 * m.width
  rows = routed * m.width if per_device.experts(c, sizes).exchanged > 1 else 0.0

  def of_mlp(kind: str) -> float:
    hidden = per_device.hidden_width(m, kind, routed) / s.mlp
    # Rows that came from other devices, and their gradients by `gate` and by `up`. They live with
    # the gradients of the hidden activations, when those activations are not needed any more.
    return max(3 * hidden, 2 * hidden + 3 * rows * (kind == "moe"))

  # Of the iterations of the layers' scans, the one with the most.
  inside, several = max(
    (sum(each + of_mlp(mlp) for _, mlp in stack.kinds), len(stack.kinds)) for stack in stacks.of(m)
  )
  yield Buffer(
    f"layers (backward pass of {several})",
    "layer",
    f"[{several},{s.rows:g},{s.length:g},…]",
    (s.rows * s.length) * inside * itemsize,
    f"mesh.tensor; {_FEWER_TOKENS}",
  )


def _attention_buffers(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], chip: Chip | None, form: str
) -> Iterator[Buffer]:
  """Buffers of attention in one layer's backward pass, in addition to its inputs and output."""
  m, s = c.model, per_device.share(c, sizes)
  # Results of the fused backward kernel that are added up after it.
  parts = estimate.parts_bytes(c, sizes, chip) if chip else 0
  if parts:
    keys = f"mesh.tensor; {_FEWER_TOKENS}"
    yield Buffer("layers/attn (parts of a gradient)", "layer", "one layer", parts, keys)
  each = _pair_bytes(c, form)
  if each and not _saved_pair_bytes(c, sizes, form):
    heads = m.num_heads / s.heads
    shape = f"[{s.rows:g},{s.length:g},{heads:g},{s.length:g}]"
    yield Buffer(_PAIRS, "layer", shape, s.rows * heads * s.length**2 * each, _FEWER_PAIRS)


def _pair_bytes(c: ml_collections.ConfigDict, form: str) -> float:
  """Bytes for each pair of a query and a key, which kernels do not keep.

  By definition the logits are in memory in float32 and the weights in the model's dtype. `batched`
  keeps the weights, and the slopes of a softcap, of the pairs that it computes.
  """
  weights = per_device.itemsize(c.model)
  if form == "reference":
    return 4 + weights
  if form == "batched":
    arrays = 1 if c.model.attn_softcap is None else 2
    return arrays * weights * batched.computed_share(c.data.seq_len, c.model.causal)
  return 0.0


def _saved_pair_bytes(c: ml_collections.ConfigDict, sizes: Mapping[str, int], form: str) -> float:
  """Bytes for each pair of a query and a key that autodiff saves in all layers.

  Any rematerialization computes the pairs again, and so does the ring over sharded rows. By
  definition the tanh of a softcap is saved too.
  """
  if c.model.remat != "none" or sizes["seq"] > 1:
    return 0.0
  tanh = 4 if form == "reference" and c.model.attn_softcap is not None else 0
  return _pair_bytes(c, form) + tanh


def peak(found: Sequence[Buffer]) -> float:
  """Bytes on a device at the worst moment of a step.

  Three moments compete. In the head's backward pass all saved activations are alive. In the
  backward pass of the last layers they still are, with one layer's buffers, the gradients, and on
  some chips the logits. In the forward pass of a fixed model they are, with its gathered weights.
  The update of the state is in place and adds nothing.

        forward ───────► head ──► backward of the last layer ───► … ───► update
        saved activations grow │  full              │  shrink
                               └ + logits           └ + one layer, gradients

  Args:
    found: From `buffers`.
  """
  kinds: dict[str, float] = collections.defaultdict(float)
  for buffer in found:
    kinds[buffer.kind] += buffer.bytes
  backward = (
    kinds["saved"]
    + kinds["layers"]
    + max(kinds["logits"] + max(kinds["head"], kinds["layer"] + kinds["gradients"]), kinds["fixed"])
  )
  return backward + kinds["parameters"] + kinds["optimizer"]


def total(c: ml_collections.ConfigDict, topology: Topology) -> float:
  """Bytes on a device of a topology at the worst moment of a step, as a search estimates them."""
  sizes = mesh_lib.axis_sizes(c.mesh, topology.num_devices)
  return peak(buffers(c, sizes, per_device.count(c), topology.chip))
