"""What a step takes by arithmetic alone: bytes by kind, seconds by kind. The search prunes by it.

Compiled figures decide; `docs/benchmarks.md` says how far these are from them.
"""

import collections
import functools
import math
from typing import NamedTuple

import ml_collections

from jaxgpt import tree
from jaxgpt.config.remat import activations
from jaxgpt.model import stacks, transformer
from jaxgpt.parallel import chips, sharding
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.training import optimizers

_DOTS = ("q", "k", "v", "attention", "o", "gate", "up", "down")
KERNEL_RATE = 0.5  # share of the peak that an attention kernel is taken to reach
_KERNEL_BACKWARD = 3.5  # times the forward kernel's work
# How often memory is read or written, in arrays of a layer: what the schedules of compiled programs
# came to (Llama-2-7B and Llama-3-8B on v5e, v5p and v6e; docs/log.md).
_LAYER_PASSES = 60  # of the residual stream's size: all that is no matmul and no kernel
_SAVED_PASSES = 5  # of what is saved: stacked, cut out of the stack, read
_TENSOR_PASSES = 33  # of the residual stream's size, for each further device that splits the heads
_RING_PASSES = 45, 35  # of the queries' size in float32: of a ring, and for each of its hops
_TENSOR_HOPS = 10  # of the residual stream: gathers and scatters of both branches, both ways


class Buffer(NamedTuple):
  """Something that takes memory on a device.

  Attributes:
    name: where it is in the model.
    kind: 'saved', 'layers', 'logits', 'head', 'layer', 'gradients', 'parameters' or 'optimizer';
      see `memory`.
    shape: on one device, as text.
    bytes: its size.
    keys: what in the config makes it smaller.
  """

  name: str
  kind: str
  shape: str
  bytes: float
  keys: str


class Weight(NamedTuple):
  """A parameter: its shape, the mesh axes that cut it, and whether it is trained."""

  shape: tuple
  cuts: tuple
  trained: bool

  def numbers(self, sizes, gathered=False):
    """Numbers of it on a device of a mesh {axis: size}, or of all that fsdp cuts it into."""
    sizes = sizes | {"fsdp": 1} if gathered else sizes
    return math.prod(self.shape) / math.prod(sizes[name] for name in self.cuts)


class Counts(NamedTuple):
  """A model's `Weight`s: those stacked over the layers, and the others."""

  layers: tuple
  others: tuple

  @property
  def all(self):
    """How many numbers they are."""
    return sum(math.prod(w.shape) for w in self.layers + self.others)

  def held(self, sizes, trained=False):
    """Numbers on a device; of those that are trained, or of all."""
    return _held(self.layers + self.others, tuple(sizes.items()), trained)

  def of_layer(self, sizes, num_layers):
    """Numbers of a layer on a device, gathered over fsdp."""
    own = num_layers / sizes["stage"]
    return sum(w.numbers(sizes, gathered=True) for w in self.layers) / own


@functools.cache
def _held(weights, sizes, trained):
  return sum(w.numbers(dict(sizes)) for w in weights if w.trained or not trained)


def count(c):
  """The `Counts` of a resolved config."""
  model = transformer.Transformer(ml_collections.FrozenConfigDict(c.model))
  shapes, axes = transformer.abstract(model)
  axes, trained = tree.flatten(axes, is_leaf=sharding.is_axes), optimizers.trained(c.optim, axes)
  rules, stacked, others = sharding.rules(c.mesh), [], []
  for name, x in tree.flatten(shapes).items():
    cuts = sum(map(rules.mesh_axes, axes[name]), ())
    (stacked if "layers" in axes[name] else others).append(Weight(x.shape, cuts, name in trained))
  return Counts(tuple(stacked), tuple(others))


class _Part(NamedTuple):
  """A device's part of a microbatch, and what cuts the other dimensions of its arrays."""

  rows: float
  length: float
  residual: float
  heads: int
  mlp: int
  vocab: int


def _part(c, sizes):
  shards = mesh_lib.num_batch_shards(sizes) * c.optim.accumulate
  rules = sharding.rules(c.mesh)
  parts = lambda axis: math.prod(sizes[name] for name in rules.mesh_axes(axis))
  return _Part(
    c.data.batch_size / shards,
    c.data.seq_len / parts("length"),
    parts("residual_length") * parts("act_embed") / parts("length"),
    parts("act_heads"),
    parts("act_mlp"),
    parts("act_vocab"),
  )


def saved_names(remat):
  """Names of results that `model.remat` keeps on the device, of those the model names."""
  if remat.startswith(("save:", "offload:")):
    return activations(remat).saved
  kept = {"full": (), "save_qkv": _DOTS[:3], "save_attention": _DOTS[:4], "dots": _DOTS[:-1]}
  return kept.get(remat, _DOTS)


def buffers(c, sizes, counts):
  """The `Buffer`s of a step on one device, largest first; see `memory` for which live at once.

  Args:
    c: a resolved config.
    sizes: of the mesh, {axis: size}.
    counts: from `count`.
  """
  m = c.model
  found = [*_saved(c, sizes), *_of_head(c, sizes), *_of_layer(c, sizes, counts)]
  fewer = "mesh.fsdp, mesh.tensor"
  found.append(
    Buffer("parameters", "parameters", f"{counts.all:,} in float32", 4 * counts.held(sizes), fewer)
  )
  mine = 4 * counts.held(sizes, trained=True)
  bytes_ = _moment_bytes(c.optim)
  found.append(
    Buffer(
      "opt",
      "optimizer",
      f"{bytes_:g} bytes per parameter",
      mine / 4 * bytes_,
      "mesh.fsdp, optim.name, optim.first_dtype, optim.second_dtype",
    )
  )
  if c.optim.ema:
    found.append(Buffer("ema", "optimizer", "1 per parameter", mine, "mesh.fsdp, optim.ema=0"))
  copies = 2 if c.optim.accumulate > 1 else 1
  found.append(Buffer("gradients", "gradients", f"{copies:g} per parameter", mine * copies, fewer))
  if _wide(m) < 4:  # cast before the loop over the layers, so that half as much is gathered
    size = _wide(m) * _held(counts.layers, tuple(sizes.items()), False)
    found.append(Buffer("layers (weights as they are gathered)", "layers", "shards", size, fewer))
  return sorted(found, key=lambda b: -b.bytes)


def _moment_bytes(o):
  """Bytes of the optimizer's state for a parameter."""
  first, second = (2 if dtype == "bfloat16" else 4 for dtype in (o.first_dtype, o.second_dtype))
  return {"adamw": first + second, "lion": first, "muon": first + 0.2 * second, "adafactor": 0.04}[
    o.name
  ]


_FEWER = "data.batch_size (fewer rows), optim.accumulate (more microbatches)"


def _saved(c, sizes):
  """What the forward pass keeps of all layers."""
  m, s = c.model, _part(c, sizes)
  wide, rows = _wide(m), f"{s.rows:g},{s.length:g}"
  each = m.num_layers * s.rows * s.length

  def one(name, width, size, keys=_FEWER):
    return Buffer(name, "saved", f"[{m.num_layers},{rows},{width:g}]", each * width * size, keys)

  yield one("layers (input of each)", m.width / s.residual, wide)
  names, widths = saved_names(m.remat), _widths(m, padded=True)
  for name in names:
    if name == "down" and m.norm_placement == "pre":
      continue  # it is but added to the stream: no gradient needs it, and XLA drops it
    where = "mlp" if name in ("gate", "up", "down") else "attn"
    across = s.residual if name in ("o", "down") else s.mlp if where == "mlp" else s.heads
    yield one(
      f"layers/{where}/{name}",
      widths[name] / across,
      wide,
      f"model.remat without {name!r}; {_FEWER}",
    )
  if "attention" in names:
    yield one("layers/attn (statistics)", m.num_heads / s.heads, 4)
  if m.remat == "none":
    yield one(
      "layers (norms, activations)",
      _unnamed(m, s),
      wide,
      "model.remat=save:q,k,v,attention,gate,up",
    )


def _unnamed(m, s):
  """Numbers a token that autodiff saves of a layer beside its input and what has a name."""
  # Of each norm its result; of RMSNorm, in float32, its input and two products too.
  norms = m.width * (2 + 6 * (4 / _wide(m) if m.norm == "rmsnorm" else 0))
  # What is multiplied by o's weight; of the MLP the activation, its derivative and products.
  return norms + widest(m) / s.heads + (4 if m.gated else 1) * m.mlp_width / s.mlp


def _of_head(c, sizes):
  """What the head holds, of one microbatch."""
  m, s = c.model, _part(c, sizes)
  if m.head != "lm":
    return
  vocab, tokens, rows = m.vocab_size / s.vocab, s.rows * s.length, f"{s.rows:g},{s.length:g}"
  weight = m.width * vocab
  yield Buffer(
    "final_norm (input, result, gradient)",
    "logits",
    f"[{rows},{m.width}]",
    tokens * m.width * (2 * _wide(m) + 4),
    _FEWER,
  )
  if 0 < c.objective.loss_chunk < tokens:
    tokens, rows = c.objective.loss_chunk, f"{c.objective.loss_chunk}"
    # Made with the loss, and scaled after the layers' backward pass.
    yield Buffer(
      "head/weight (gathered, and gradient)",
      "logits",
      f"[{m.width},{vocab:g}]",
      weight * (4 + _wide(m)),
      "mesh.tensor",
    )
    logits = "head"
  else:
    # The gradient of the head's weight is made at once (v5e, v6e), or after the layers' backward
    # pass (v5p), through which the logits then live. Nothing here knows the chip: both are counted.
    yield Buffer(
      "head/weight (gradient)", "head", f"[{m.width},{vocab:g}]", weight * 4, "mesh.tensor"
    )
    logits = "logits"
  yield Buffer(
    "head/logits",
    logits,
    f"[{rows},{vocab:g}]",
    tokens * vocab * 4,
    f"objective.loss_chunk, mesh.tensor; {_FEWER}",
  )


def _of_layer(c, sizes, counts):
  """What the backward pass of a layer holds: weights, and what waits for weights' gradients."""
  m, s = c.model, _part(c, sizes)
  wide, w = _wide(m), _widths(m, padded=True)
  tokens = s.rows * s.length
  # Where no token is dropped, a device has the weights of all experts.
  cut = sizes if m.moe.capacity else sizes | {"expert": 1}
  yield Buffer(
    "layers (gathered)",
    "layer",
    "one layer",
    counts.of_layer(cut, m.num_layers) * wide,
    "moe.capacity, mesh.tensor" if cut != sizes else "mesh.tensor",
  )
  # Queries, keys, values and attention's output, the MLP's insides: with their gradients.
  inside = (
    2 * (w["q"] + w["k"] + w["v"] + w["attention"]) / s.heads + 3 * w["up"] / s.mlp + 4 * m.width
  )
  several = max(len(stack.kinds) for stack in stacks.of(m))  # that a turn of the loop goes through
  yield Buffer(
    f"layers (backward pass of {several})",
    "layer",
    f"[{several},{s.rows:g},{s.length:g},…]",
    several * tokens * inside * wide,
    f"mesh.tensor; {_FEWER}",
  )


def memory(found):
  """Bytes of a device at the worst moment, of `buffers`.

  The moments: the head's backward pass, when all of the layers' results are saved; that of the last
  layers, when those are still there, and perhaps the logits. The update is in place.
  """
  kinds = collections.Counter()
  for buffer in found:
    kinds[buffer.kind] += buffer.bytes
  backward = (
    kinds["saved"]
    + kinds["layers"]
    + kinds["logits"]
    + max(kinds["head"], kinds["layer"] + kinds["gradients"])
  )
  return backward + kinds["parameters"] + kinds["optimizer"]


def total(c, num_devices):
  """As `memory`, of a resolved config on so many devices."""
  sizes = mesh_lib.axis_sizes(c.mesh, num_devices)
  return memory(buffers(c, sizes, count(c)))


def seconds(c, sizes, counts, topology):
  """Rough seconds of a step by kind, as `report.figures` has them. It ranks; compiling decides.

  Args:
    c, sizes, counts: as in `buffers`.
    topology: a `topology.Topology`.

  Returns:
    {'matmul', 'other', 'kernels', 'exposed', 'between'}; the last is what slices wait for each other.

  Raises:
    UserError: the layers don't make a pipeline of so many stages.
  """
  m, s, chip = c.model, _part(c, sizes), topology.chip
  tokens = s.rows * s.length * c.optim.accumulate
  wide, weights = _wide(m), _layer_weights(m)
  names = saved_names(m.remat) + activations(m.remat).offloaded
  weights = {n: w / (s.mlp if n in ("gate", "up", "down") else s.heads) for n, w in weights.items()}
  again = sum(weights[n] for n in ("q", "k", "v", "o", "gate", "up") if n not in names)
  head = m.width * m.vocab_size / s.vocab if m.head == "lm" else 0
  flops = tokens * (6 * (m.num_layers * sum(weights.values()) + head) + 2 * m.num_layers * again)
  pipe = stacks.pipeline_of(c, sizes)
  busy = 1 - (pipe.bubble if pipe else 0)
  runs = 1 + _KERNEL_BACKWARD + ("attention" not in names)
  of_kernels = (
    4
    * m.num_layers
    * c.data.seq_len
    * widest(m)
    / s.heads
    * tokens
    * runs
    * visible_share(c, chip.attention_block)
  )
  held = counts.held(sizes)
  gathered = held * sizes["fsdp"] * wide * (sizes["fsdp"] > 1)
  times = c.optim.accumulate * (
    pipe.ticks if pipe else 1
  )  # a stage gathers its layers for each tick
  matmul = flops / (chip.clocked_flops * chip.matmul_rate) / busy
  # Forward and backward the weights are gathered, and then their gradients are summed.
  hidden, summed = (2 * gathered, gathered) if chip.overlaps_gathers else (0, 3 * gathered)
  exposed = (
    max(summed, held * wide * 2 * (sizes["data"] * sizes["seq"] > 1)) * times
    + _between_devices(c, sizes, s, tokens)
  ) / chip.ici_bandwidth
  between = 0
  if topology.slices > 1:  # the sum of gradients, once; with fsdp over slices the weights too
    bytes_ = 2 * held * wide if sizes["data"] % topology.slices == 0 else 3 * gathered * times
    between = bytes_ * (topology.slices - 1) / topology.slices / chip.dcn_bandwidth
  return {
    "matmul": matmul,
    "other": tokens * _traffic(c, sizes, s, names) / chip.hbm_bandwidth / busy,
    "kernels": of_kernels / (chip.clocked_flops * KERNEL_RATE) / busy,
    "exposed": exposed + max(hidden * times / chip.ici_bandwidth - matmul, 0),
    "between": between,
  }


def _traffic(c, sizes, s, names):
  """Bytes a token that are read and written beside the matmuls.

  Args:
    names: of what is saved.
  """
  m, wide, widths = c.model, _wide(c.model), _widths(c.model)
  apart = {
    n: widths[n] / (s.mlp if n in ("gate", "up") else s.residual if n in ("o", "down") else s.heads)
    for n in names
  }
  each = wide * (m.width / s.residual * _LAYER_PASSES + sum(apart.values()) * _SAVED_PASSES)
  if s.heads * s.mlp > 1:  # between the branches' matmuls a device has whole tokens
    each += wide * m.width / s.residual * _TENSOR_PASSES * (max(s.heads, s.mlp) - 1)
  if sizes["seq"] > 1:  # the parts of the output are added up, and so are those of the gradients
    each += 4 * widths["q"] / s.heads * (_RING_PASSES[0] + _RING_PASSES[1] * (sizes["seq"] - 1))
  # Logits are written once, and read and written again on the way back.
  return m.num_layers * each + (4 * 4 * m.vocab_size / s.vocab if m.head == "lm" else 0)


def _between_devices(c, sizes, s, tokens):
  """Bytes of activations that a device waits for in a step."""
  m, wide = c.model, _wide(c.model)
  each, total = m.num_layers * tokens * wide, 0
  if s.heads * s.mlp > 1:
    total += _TENSOR_HOPS * each * m.width
  if (
    sizes["seq"] > 1
  ):  # a hop of keys and values both ways, and of their gradients; others are hidden
    total += 3 * each * (_widths(m)["k"] + _widths(m)["v"]) / s.heads
  if sizes["expert"] > 1:  # there and back, both ways
    total += 4 * each * m.width * m.moe.per_token * max(m.moe.capacity, 1)
  return total


def visible_share(c, block, seq=1):
  """Share of the pairs of positions that attention's kernels compute, over the layers.

  Args:
    c: the resolved config.
    block: `attention_block` of the chip.
    seq: devices that share a row, and so the pairs that kernels are given (see `model.ring`).
  """
  T = c.data.seq_len / seq
  # A device's own pairs, and beside them half as many of each other device's, all of them visible.
  causal = (
    (min((T + block) / (2 * T), 1) + (seq - 1) / 2) / ((seq + 1) / 2) if c.model.causal else 1
  )
  local = causal
  if c.model.window:
    size = T if seq == 1 else T / 2  # of the pieces that meet; beside them neighbours' ends
    far = 0 if seq == 1 else min(c.model.window / size, seq) * (1 if c.model.causal else 2)
    local = min((c.model.window + block) / (size * (1 + far)), causal)
  pattern = c.model.attention_pattern
  return sum(local if kind == "local" else causal for kind in pattern) / len(pattern)


def widest(m):
  """Numbers of all heads together."""
  return m.num_heads * m.head_dim


def _wide(m):
  return 2 if m.dtype == "bfloat16" else 4


def _widths(m, padded=False):
  """Numbers a token of each named result; `padded` as TPUs lay them out, whose lanes a head fills."""
  used = m.moe.per_token * max(m.moe.capacity, 1) + m.moe.shared if "moe" in m.mlp_pattern else 1
  hidden = m.moe.width * used if "moe" in m.mlp_pattern else m.mlp_width
  size = lambda n: -(-n // chips.LANES) * chips.LANES if padded else n
  key, value = size(m.head_dim), size(m.latent.v_dim)
  return {
    "q": m.num_heads * key,
    "k": m.num_kv_heads * key,
    "v": m.num_kv_heads * value,
    "attention": m.num_heads * value,
    "o": m.width,
    "gate": hidden if m.gated else 0,
    "up": hidden,
    "down": m.width,
  }


def _layer_weights(m):
  """Numbers of the weights that make each named result, those that a token uses."""
  w = _widths(m)
  return {
    "q": m.width * w["q"],
    "k": m.width * w["k"],
    "v": m.width * w["v"],
    "o": w["attention"] * m.width,
    "gate": m.width * w["gate"],
    "up": m.width * w["up"],
    "down": w["up"] * m.width,
  }
