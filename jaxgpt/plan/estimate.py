"""What a step takes by arithmetic alone: bytes by kind, seconds by kind. The search prunes by it.

Compiled figures decide; `docs/benchmarks.md` says how far these are from them.
"""

import math
from typing import NamedTuple

import ml_collections

from jaxgpt import mesh as mesh_lib
from jaxgpt import optim, sharding, tree
from jaxgpt.model import transformer

_DOTS = ("q", "k", "v", "attention", "o", "gate", "up", "down")
_MATMUL_RATE = 0.85  # share of the peak that matmuls reach
_OTHER_SHARE = 0.12  # time of what is no matmul, as a share of the matmuls'


class Buffer(NamedTuple):
  """Something that takes memory on a device.

  Attributes:
    name: where it is in the model.
    kind: 'saved', 'loss', 'layer', 'parameters', 'optimizer' or 'gradients'.
    shape: on one device, as text.
    bytes: its size.
    keys: what in the config makes it smaller.
  """
  name: str
  kind: str
  shape: str
  bytes: float
  keys: str


class Counts(NamedTuple):
  """Parameters of a model: all, those of one layer, and those that are trained."""
  all: int
  of_layer: float
  trained: int


def count(c):
  """The `Counts` of a resolved config."""
  model = transformer.Transformer(ml_collections.FrozenConfigDict(c.model))
  shapes, axes = transformer.abstract(model)
  counts = {name: math.prod(x.shape) for name, x in tree.flatten(shapes).items()}
  stacked = [name for name, a in tree.flatten(axes, is_leaf=sharding.is_axes).items()
             if "layers" in a]
  trained = optim.trained(c.optim, axes)
  return Counts(sum(counts.values()), sum(counts[n] for n in stacked) / c.model.num_layers,
                sum(counts[n] for n in counts if n in trained))


class _Part(NamedTuple):
  """A device's part of a microbatch, and of the heads and columns."""
  rows: float
  length: float
  tensor: int


def _part(c, sizes):
  shards = mesh_lib.num_batch_shards(sizes) * c.optim.accumulate
  return _Part(c.data.batch_size / shards, c.data.seq_len / sizes["seq"], sizes["tensor"])


def saved_names(remat):
  """Names of results that a value of `model.remat` keeps, of those the model names."""
  if remat.startswith("save:"):
    return tuple(remat.removeprefix("save:").split(","))
  return {"full": (), "save_qkv": _DOTS[:3], "save_attention": _DOTS[:4]}.get(remat, _DOTS)


def buffers(c, sizes, counts):
  """The `Buffer`s of a step on one device, largest first; see `memory` for which live at once.

  Args:
    c: a resolved config.
    sizes: of the mesh, {axis: size}.
    counts: from `count`.
  """
  m, s = c.model, _part(c, sizes)
  wide = 2 if m.dtype == "bfloat16" else 4
  tokens, shards = s.rows * s.length, sizes["fsdp"] * s.tensor * sizes["expert"]
  widths = _widths(m)
  out = []

  def add(name, kind, shape, size, keys):
    out.append(Buffer(name, kind, shape, size, keys))

  rows = f"{s.rows:g},{s.length:g}"
  fewer = "data.batch_size (fewer rows), optim.accumulate (more microbatches)"
  add("layers (input of each)", "saved", f"[{m.num_layers},{rows},{m.width}]",
      m.num_layers * tokens * m.width * wide / s.tensor, fewer)
  names = saved_names(m.remat)
  for name in names:
    across = 1 if name in ("o", "down") else s.tensor
    add(f"layers/{'mlp' if name in ('gate', 'up', 'down') else 'attn'}/{name}", "saved",
        f"[{m.num_layers},{rows},{widths[name] // across}]",
        m.num_layers * tokens * widths[name] * wide / across, f"model.remat without {name!r}; {fewer}")
  if m.remat == "none":
    add("layers (norms, activations)", "saved", f"[{m.num_layers},{rows},…]",
        m.num_layers * tokens * (6 * m.width + 4 * m.mlp_width / s.tensor) * wide,
        "model.remat=save:q,k,v,attention,gate,up")
  if m.head == "lm":
    vocab = m.vocab_size / s.tensor
    add("head/logits", "loss", f"[{rows},{vocab:g}]", tokens * vocab * 4,
        f"mesh.tensor; {fewer}")
    # Gathered, and its gradient in float32.
    add("head/weight", "loss", f"[{m.width},{vocab:g}]", m.width * vocab * (4 + wide),
        "mesh.tensor")
    add("embed", "loss", f"[{vocab:g},{m.width}]", vocab * m.width * wide, "mesh.tensor")
  own = counts.of_layer / s.tensor
  add("layers (gathered ahead of the backward pass)", "loss", "part of a layer",
      own * wide * 0.35, "mesh.tensor")
  add("layers (gathered, and gradients)", "layer", "one layer, and parts of the next",
      own * wide * 1.5 + tokens * (4 * m.mlp_width / s.tensor + 8 * m.width) * wide, "mesh.tensor")
  state = 4 / shards
  add("parameters", "parameters", f"{counts.all:,} in float32", counts.all * state,
      "mesh.fsdp, mesh.tensor")
  moments = {"adamw": 2, "lion": 1, "muon": 1.2, "adafactor": 0.01}[c.optim.name]
  add("opt", "optimizer", f"{moments:g} per parameter", counts.trained * moments * state,
      "mesh.fsdp, optim.name")
  if c.optim.ema:
    add("ema", "optimizer", "1 per parameter", counts.trained * state, "mesh.fsdp, optim.ema=0")
  copies = 2 if c.optim.accumulate > 1 else 1
  add("gradients", "gradients", f"{counts.trained:,}", counts.trained * state * copies, "mesh.fsdp")
  return sorted(out, key=lambda b: -b.bytes)


def memory(found):
  """Bytes of a device at the worst moment, of `buffers`."""
  kinds = {}
  for buffer in found:
    kinds[buffer.kind] = kinds.get(buffer.kind, 0) + buffer.bytes
  worst = max(kinds.get("loss", 0), kinds["layer"] + kinds["gradients"])
  return kinds.get("saved", 0) + worst + kinds["parameters"] + kinds["optimizer"]


def seconds(c, sizes, counts, chip):
  """Rough seconds of a step: {'matmul', 'other', 'exposed'}. It ranks; the compiler decides.

  Args:
    c, sizes, counts: as in `buffers`.
    chip: a `chips.Chip`.
  """
  m, s = c.model, _part(c, sizes)
  tokens = s.rows * s.length * c.optim.accumulate
  names = saved_names(m.remat)
  weights = _layer_weights(m)
  again = sum(weights[n] for n in ("q", "k", "v", "o", "gate", "up") if n not in names)
  active = m.num_layers * sum(weights.values()) + m.width * m.vocab_size
  flops = tokens * (6 * active + 2 * m.num_layers * again) / s.tensor
  attention = 0 if "attention" in names else 2 * m.num_layers * c.data.seq_len * widest(m) * tokens
  matmul = (flops + attention / s.tensor) / (chip.peak_flops * _MATMUL_RATE)
  wide = 2 if m.dtype == "bfloat16" else 4
  gathered = counts.all / s.tensor * wide
  passes = c.optim.accumulate
  hidden = 2 * gathered * passes / chip.ici_bandwidth  # forward and backward
  reduced = gathered * passes
  between = 0
  if s.tensor > 1:  # a gather and a scatter of the activations for each branch, both ways
    between = 8 * m.num_layers * tokens * m.width * wide
  exposed = (reduced + between) / chip.ici_bandwidth + max(hidden - matmul, 0)
  return {"matmul": matmul, "other": matmul * _OTHER_SHARE * (1 if s.tensor == 1 else 1.3),
          "exposed": exposed}


def widest(m):
  """Numbers of all heads together."""
  return m.num_heads * m.head_dim


def _widths(m):
  """Numbers a token of each named result."""
  used = m.moe.per_token + m.moe.shared if "moe" in m.mlp_pattern else 1
  hidden = m.moe.width * used if "moe" in m.mlp_pattern else m.mlp_width
  return {"q": m.num_heads * m.head_dim, "k": m.num_kv_heads * m.head_dim,
          "v": m.num_kv_heads * m.latent.v_dim, "attention": m.num_heads * m.latent.v_dim,
          "o": m.width, "gate": hidden if m.gated else 0, "up": hidden, "down": m.width}


def _layer_weights(m):
  """Numbers of the weights that make each named result, those that a token uses."""
  w = _widths(m)
  return {"q": m.width * w["q"], "k": m.width * w["k"], "v": m.width * w["v"],
          "o": w["attention"] * m.width, "gate": m.width * w["gate"], "up": m.width * w["up"],
          "down": w["up"] * m.width}
