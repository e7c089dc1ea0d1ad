"""Weights and activations per device, by arithmetic: inputs of the memory and time estimates."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from jaxgpt import tree
from jaxgpt.config.keys.layer_kinds import mlp_kinds
from jaxgpt.config.remat import ACTIVATIONS, ATTENTION, DOWN, INPUT, QKV, activations
from jaxgpt.model import fixed_models, transformer
from jaxgpt.model.experts import capacity, dropless
from jaxgpt.model.quantization import quantized_base
from jaxgpt.parallel import chips, sharding
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.run import teacher
from jaxgpt.training import objectives, optimizers


class Weight(NamedTuple):
  """A parameter.

  Attributes:
    shape: Its global shape.
    axes: Logical axes of its dimensions.
    mesh_axes: Mesh axes that shard each of its dimensions.
    trained: Whether the optimizer updates it.
    itemsize: Bytes of an entry, as it is stored.
    is_code: Whether it holds codes or scales of a quantized weight, see `quantized_base`. These
      are gathered as they are stored, other weights in the dtype of activations.
    packed: Numbers in each entry: 2 for codes of 4 bits.
  """

  shape: tuple[int, ...]
  axes: sharding.Axes
  mesh_axes: tuple[tuple[str, ...], ...]
  trained: bool
  itemsize: int = 4
  is_code: bool = False
  packed: int = 1

  def entries(self, sizes: Mapping[str, int], gathered: bool = False) -> float:
    """Number of entries on one device of a mesh {axis: size}.

    Args:
      sizes: Sizes of the mesh axes.
      gathered: Counts the weight after the all-gather over fsdp. Experts stay where they are: their
        tokens come to them.
    """
    held = 1.0
    for size, axis, names in zip(self.shape, self.axes, self.mesh_axes, strict=True):
      whole = gathered and axis != "experts"
      shards = math.prod(sizes[name] for name in names if not (whole and name == "fsdp"))
      held *= size if size % shards else size / shards  # see `sharding.params_shardings`
    return held

  def replicated(self, sizes: Mapping[str, int], axes: Sequence[str]) -> bool:
    """Whether devices along one of some mesh axes hold the same entries."""
    used = set()
    for size, names in zip(self.shape, self.mesh_axes, strict=True):
      if size % math.prod(sizes[name] for name in names) == 0:
        used |= set(names)
    return any(sizes[axis] > 1 and axis not in used for axis in axes)


class Counts(NamedTuple):
  """The weights of a model.

  Attributes:
    layers: Weights that are stacked over the layers.
    others: All other weights.
  """

  layers: tuple[Weight, ...]
  others: tuple[Weight, ...]

  @property
  def all(self) -> int:
    """Number of parameters of the model."""
    return sum(math.prod(w.shape) for w in self.layers + self.others)

  def trained_shares(self, m: ml_collections.ConfigDict) -> tuple[float, float]:
    """Shares of the layers' and the head's matmuls whose weights are trained.

    Args:
      m: The `model` section.
    """
    done = {True: 0.0, False: 0.0}
    for w in filter(lambda w: sharding.is_weight(w.axes), self.layers):
      used = m.moe.per_token / m.moe.experts if "experts" in w.axes else 1
      done[w.trained] += used * math.prod(w.shape)
    of_head = ("vocab", "embed") if m.tie_embeddings else ("embed", "vocab")
    head = next((w.trained for w in self.others if w.axes == of_head), True)
    return done[True] / (sum(done.values()) or 1.0), float(head)

  def held(self, sizes: Mapping[str, int], trained: bool = False) -> float:
    """Number of parameters on one device.

    Args:
      sizes: Sizes of the mesh axes, {axis: size}.
      trained: Counts only parameters that are trained.
    """
    return _held(self.layers + self.others, tuple(sizes.items()), trained)

  def held_bytes(self, sizes: Mapping[str, int]) -> float:
    """Bytes of the parameters on one device."""
    return _held(self.layers + self.others, tuple(sizes.items()), False, "stored")

  def cast_of_layers(self, sizes: Mapping[str, int]) -> float:
    """Number of the layers' parameters on one device that are cast before they are gathered."""
    return _held(self.layers, tuple(sizes.items()), False, "cast")

  def layer_bytes(self, sizes: Mapping[str, int], num_layers: int, itemsize: int) -> float:
    """Bytes of a single layer's weights on one device, after the all-gather over fsdp.

    Args:
      sizes: Sizes of the mesh axes, {axis: size}.
      num_layers: Layers of the model.
      itemsize: Bytes of a gathered weight. Codes are gathered, and the weights are made of them.
    """
    total = 0.0
    for w in self.layers:
      each = itemsize if not w.is_code else w.itemsize + (itemsize * w.packed)
      total += w.entries(sizes, gathered=True) * each
    return total / (num_layers / sizes["stage"])


@functools.cache  # the search asks for the same few meshes thousands of times
def _held(
  weights: tuple[Weight, ...], sizes: tuple[tuple[str, int], ...], trained: bool, unit: str = ""
) -> float:
  """A sum over weights: of entries, or of the bytes or entries that `unit` names."""
  each = {
    "": lambda w: 1,
    "stored": lambda w: w.itemsize,
    "cast": lambda w: not w.is_code,
  }[unit]
  return sum(w.entries(dict(sizes)) * each(w) for w in weights if w.trained or not trained)


def count(c: ml_collections.ConfigDict) -> Counts:
  """The weights of a resolved config."""
  model = transformer.Transformer(ml_collections.FrozenConfigDict(c.model))
  shapes, axes = transformer.abstract(model)
  axes, trained = tree.flatten(axes, is_leaf=sharding.is_axes), optimizers.trained(c.optim, axes)
  rules = sharding.rules(c.mesh)
  stacked: list[Weight] = []
  others: list[Weight] = []
  for name, x in tree.flatten(shapes).items():
    weight = Weight(
      x.shape,
      axes[name],
      tuple(map(rules.mesh_axes, axes[name])),
      name in trained,
      x.dtype.itemsize,
      quantized_base.is_code(name),
      2 if x.dtype == np.uint8 else 1,
    )
    (stacked if "layers" in axes[name] else others).append(weight)
  return Counts(tuple(stacked), tuple(others))


class Share(NamedTuple):
  """The share of one microbatch that a device works on, and how activations are sharded.

  Attributes:
    rows: Rows per device.
    length: Tokens of each row per device.
    residual: Shards of the residual stream between the blocks, beyond those in `length`.
    heads: Shards of the attention heads.
    mlp: Shards of the MLP's hidden dimension.
    vocab: Shards of the vocabulary.
    routed: Rows in a device's routed experts of a layer, for each of its tokens.
    sequences: Sequences of each row, computed one after the other: 2 for pairs.
    kept: Those of them whose activations are in memory at the same time.
  """

  rows: float
  length: float
  residual: float
  heads: int
  mlp: int
  vocab: int
  routed: float
  sequences: int = 1
  kept: int = 1

  def shards(self, name: str) -> float:
    """Number of devices over which the width of an activation, such as 'gate', is sharded."""
    if name in ("o", "down"):
      return self.residual
    return self.mlp if name in ("gate", "up") else self.heads

  @property
  def tokens(self) -> float:
    """Tokens per device in a microbatch, of all sequences."""
    return self.rows * self.length * self.sequences


def share(c: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> Share:
  """The `Share` of a device of a mesh {axis: size}."""
  microbatch_shards = mesh_lib.num_batch_shards(sizes) * c.optim.accumulate
  rules = sharding.rules(c.mesh)
  shards = lambda axis: math.prod(sizes[name] for name in rules.mesh_axes(axis))
  objective = objectives.find(c)
  # A loss over the whole batch has the activations of one microbatch of one sequence in memory.
  kept = 1 if objective.whole_batch and c.optim.accumulate > 1 else objective.sequences
  return Share(
    c.data.batch_size / microbatch_shards,
    c.data.seq_len / shards("length"),
    shards("residual_length") * shards("act_embed") / shards("length"),
    shards("act_heads"),
    shards("act_mlp"),
    shards("act_vocab"),
    routed_rows(c, sizes),
    objective.sequences,
    kept,
  )


def fixed(c: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
  """{name: config} of the models that the loss runs forward only, see `model.fixed_models`."""
  of = {fixed_models.REFERENCE: lambda: c, fixed_models.TEACHER: lambda: teacher.config_of(c)}
  return {name: of[name]() for name in objectives.find(c).fixed(c)}


def tokens_of_step(c: ml_collections.ConfigDict) -> int:
  """Tokens of a global batch, of all sequences of its rows."""
  return c.data.batch_size * c.data.seq_len * objectives.find(c).sequences


def saved_names(remat: str) -> tuple[str, ...]:
  """Names of the activations that `model.remat` saves on the device, out of those with a name."""
  if remat.startswith(("save:", "offload:")):
    return activations(remat).saved
  kept = {
    "full": (),
    "save_qkv": QKV,
    "save_attention": (*QKV, ATTENTION),
    "dots": tuple(name for name in ACTIVATIONS if name != DOWN),
  }
  return kept.get(remat, ACTIVATIONS)


def kept_names(remat: str) -> tuple[str, ...]:
  """Names of the activations that are not computed again: saved on the device, or on the host."""
  return saved_names(remat) + tuple(n for n in activations(remat).offloaded if n != INPUT)


def kept_rows(m: ml_collections.ConfigDict, routed: float) -> float:
  """Rows of the routed experts for each token whose 'gate' and 'up' a policy can keep.

  `dots` keeps matmuls without a batch dimension. Those of the experts have one, or are grouped.

  Args:
    m: The `model` section.
    routed: Rows in the routed experts for each token.
  """
  return 0.0 if m.remat == "dots" else routed


def all_heads(m: ml_collections.ConfigDict) -> int:
  """Size of all query heads together."""
  return m.num_heads * m.head_dim


def itemsize(m: ml_collections.ConfigDict) -> int:
  """Bytes of an activation or a gathered weight."""
  return 2 if m.dtype == "bfloat16" else 4


class Experts(NamedTuple):
  """The devices that share the experts. See `model.experts.dropless`.

  Attributes:
    exchanged: Devices with other tokens, which send them to each other.
    same: Devices with the same tokens. Each works on those of its experts.
  """

  exchanged: int
  same: int


def experts(c: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> Experts:
  """The devices of a mesh that share the experts: 1 each if a device has all of them."""
  m, rules = c.model, sharding.rules(c.mesh)
  axes = rules.mesh_axes("experts")
  if "moe" not in mlp_kinds(m) or m.moe.experts % math.prod(sizes[axis] for axis in axes):
    return Experts(1, 1)
  tokens = {*rules.mesh_axes("batch"), *rules.mesh_axes("length")}
  return Experts(
    math.prod(sizes[axis] for axis in axes if axis in tokens),
    math.prod(sizes[axis] for axis in axes if axis not in tokens),
  )


def expert_room(c: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> float:
  """Rows that a device has room for where tokens are exchanged, over those of an even load.

  1 for other models and meshes. See `model.experts.dropless`.
  """
  m, of = c.model, experts(c, sizes)
  if of.exchanged == 1 or m.moe.capacity:
    return 1.0
  s, X = share(c, sizes), m.moe.per_token
  N, e = math.ceil(s.rows * s.length), m.moe.experts // math.prod(of)
  return dropless.rows_of_room(N, X, of.exchanged, e, m.moe.buffer) / (N * X)


def grouped_room(c: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> float:
  """Rows that grouped matmuls have room for, over those of an even load of a device's experts.

  Devices that have the same tokens and other experts each have room for the rows of all of them.
  """
  return 1.0 if c.model.moe.capacity else expert_room(c, sizes) * experts(c, sizes).same


def routed_rows(c: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> float:
  """Rows in a device's routed experts for each of its tokens, of an even load.

  With a limit these are slots, see `model.experts.capacity`. They are sharded by rules of their
  own, and not by the length of rows.
  """
  moe, T, rules = c.model.moe, c.data.seq_len, sharding.rules(c.mesh)
  if not moe.capacity:
    return moe.per_token / experts(c, sizes).same
  shards = lambda *axes: math.prod(sizes[n] for axis in axes for n in rules.mesh_axes(axis))
  even = moe.experts % shards("experts") == 0
  slots = shards("expert_batch", "experts") if even else shards("expert_batch")
  return capacity.slots(moe, T) * moe.experts / T * shards("batch", "length") / slots


def hidden_width(m: ml_collections.ConfigDict, kind: str, routed: float) -> float:
  """Numbers per token within the MLP of a layer.

  Args:
    m: The `model` section.
    kind: Of the MLP: 'dense', 'moe' or 'none'.
    routed: Rows in the routed experts for each token.
  """
  if kind == "moe":
    return m.moe.width * (routed + m.moe.shared)
  return m.mlp_width if kind == "dense" else 0


def widths(m: ml_collections.ConfigDict, routed: float, padded: bool = False) -> dict[str, float]:
  """Numbers per token of each named activation, as a mean over the layers.

  Args:
    m: The `model` section.
    routed: Rows in the routed experts for each token: `Share.routed`, or those with room.
    padded: Counts heads as TPUs lay them out, padded to a multiple of 128.
  """
  kinds = mlp_kinds(m)
  hidden = sum(hidden_width(m, kind, routed) for kind in kinds) / len(kinds)
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
    "down": m.width * sum(kind != "none" for kind in kinds) / len(kinds),
  }


def layer_weights(m: ml_collections.ConfigDict, routed: float) -> dict[str, float]:
  """Entries of the weights that produce each named activation, as far as a token uses them.

  Args:
    m: The `model` section.
    routed: As in `widths`.
  """
  w, latent = widths(m, routed), m.latent
  q, k, v = (m.width * w[name] for name in QKV)
  if latent.kv_rank:  # keys and values of all heads come from one compressed vector
    plain = m.num_heads * (m.head_dim - latent.rope_dim)
    k = m.width * (latent.kv_rank + latent.rope_dim) + latent.kv_rank * plain
    v = latent.kv_rank * w["v"]
    q = latent.q_rank * (m.width + w["q"]) if latent.q_rank else q
  return {
    "q": q,
    "k": k,
    "v": v,
    "o": w["attention"] * m.width,
    "gate": m.width * w["gate"],
    "up": m.width * w["up"],
    "down": w["up"] * m.width,
  }
