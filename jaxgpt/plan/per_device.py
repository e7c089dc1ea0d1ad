"""Weights and activations per device, by arithmetic: inputs of the memory and time estimates."""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import ml_collections

from jaxgpt import tree
from jaxgpt.config.remat import ACTIVATIONS, ATTENTION, DOWN, QKV, activations
from jaxgpt.model import transformer
from jaxgpt.model.experts import dropless
from jaxgpt.parallel import chips, sharding
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.training import optimizers


class Weight(NamedTuple):
  """A parameter.

  Attributes:
    shape: Its global shape.
    mesh_axes: Mesh axes that shard it, over all dimensions.
    trained: Whether the optimizer updates it.
  """

  shape: tuple[int, ...]
  mesh_axes: tuple[str, ...]
  trained: bool

  def entries(self, sizes: Mapping[str, int], gathered: bool = False) -> float:
    """Number of entries on one device of a mesh {axis: size}.

    Args:
      sizes: Sizes of the mesh axes.
      gathered: Counts the weight after the all-gather over fsdp.
    """
    sizes = dict(sizes) | {"fsdp": 1} if gathered else sizes
    return math.prod(self.shape) / math.prod(sizes[name] for name in self.mesh_axes)


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

  def held(self, sizes: Mapping[str, int], trained: bool = False) -> float:
    """Number of parameters on one device.

    Args:
      sizes: Sizes of the mesh axes, {axis: size}.
      trained: Counts only parameters that are trained.
    """
    return _held(self.layers + self.others, tuple(sizes.items()), trained)

  def held_of_layers(self, sizes: Mapping[str, int]) -> float:
    """Number of the layers' parameters on one device."""
    return _held(self.layers, tuple(sizes.items()), False)

  def of_layer(self, sizes: Mapping[str, int], num_layers: int) -> float:
    """Number of a single layer's parameters on one device, after the all-gather over fsdp."""
    own = num_layers / sizes["stage"]
    return sum(w.entries(sizes, gathered=True) for w in self.layers) / own


@functools.cache  # the search asks for the same few meshes thousands of times
def _held(weights: tuple[Weight, ...], sizes: tuple[tuple[str, int], ...], trained: bool) -> float:
  return sum(w.entries(dict(sizes)) for w in weights if w.trained or not trained)


def count(c: ml_collections.ConfigDict) -> Counts:
  """The weights of a resolved config."""
  model = transformer.Transformer(ml_collections.FrozenConfigDict(c.model))
  shapes, axes = transformer.abstract(model)
  axes, trained = tree.flatten(axes, is_leaf=sharding.is_axes), optimizers.trained(c.optim, axes)
  rules = sharding.rules(c.mesh)
  stacked: list[Weight] = []
  others: list[Weight] = []
  for name, x in tree.flatten(shapes).items():
    mesh_axes: tuple[str, ...] = sum(map(rules.mesh_axes, axes[name]), ())
    (stacked if "layers" in axes[name] else others).append(
      Weight(x.shape, mesh_axes, name in trained)
    )
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
  """

  rows: float
  length: float
  residual: float
  heads: int
  mlp: int
  vocab: int

  @property
  def tokens(self) -> float:
    """Tokens per device in a microbatch."""
    return self.rows * self.length


def share(c: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> Share:
  """The `Share` of a device of a mesh {axis: size}."""
  microbatch_shards = mesh_lib.num_batch_shards(sizes) * c.optim.accumulate
  rules = sharding.rules(c.mesh)
  shards = lambda axis: math.prod(sizes[name] for name in rules.mesh_axes(axis))
  return Share(
    c.data.batch_size / microbatch_shards,
    c.data.seq_len / shards("length"),
    shards("residual_length") * shards("act_embed") / shards("length"),
    shards("act_heads"),
    shards("act_mlp"),
    shards("act_vocab"),
  )


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


def all_heads(m: ml_collections.ConfigDict) -> int:
  """Size of all query heads together."""
  return m.num_heads * m.head_dim


def itemsize(m: ml_collections.ConfigDict) -> int:
  """Bytes of an activation or a gathered weight."""
  return 2 if m.dtype == "bfloat16" else 4


def expert_room(c: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> float:
  """Rows that a device has room for where tokens are exchanged, over those of an even load.

  1 for other models and meshes. See `model.experts.dropless`.
  """
  m, rules = c.model, sharding.rules(c.mesh)
  if "moe" not in m.mlp_pattern or m.moe.capacity:
    return 1.0
  tokens = {*rules.mesh_axes("batch"), *rules.mesh_axes("length")}
  shards = math.prod(sizes[axis] for axis in rules.mesh_axes("experts"))
  n = math.prod(sizes[axis] for axis in rules.mesh_axes("experts") if axis in tokens)
  if n == 1:
    return 1.0
  N, X = math.ceil(share(c, sizes).tokens), m.moe.per_token
  return dropless.rows_of_room(N, X, n, m.moe.experts // shards, m.moe.buffer) / (N * X)


def widths(
  m: ml_collections.ConfigDict, padded: bool = False, room: float = 1.0
) -> dict[str, float]:
  """Numbers per token of each named activation.

  Args:
    m: The `model` section.
    padded: Counts heads as TPUs lay them out, padded to a multiple of 128.
    room: From `expert_room`, where memory counts and not the work of an even load.
  """
  routed = m.moe.per_token * max(m.moe.capacity, 1) * room
  used = routed + m.moe.shared if "moe" in m.mlp_pattern else 1
  hidden = m.moe.width * used if "moe" in m.mlp_pattern else m.mlp_width
  if set(m.mlp_pattern) == {"none"}:
    hidden = 0
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
    "down": m.width if hidden else 0,
  }


def layer_weights(m: ml_collections.ConfigDict) -> dict[str, float]:
  """Entries of the weights that produce each named activation, as far as a token uses them."""
  w = widths(m)
  return {
    "q": m.width * w["q"],
    "k": m.width * w["k"],
    "v": m.width * w["v"],
    "o": w["attention"] * m.width,
    "gate": m.width * w["gate"],
    "up": m.width * w["up"],
    "down": w["up"] * m.width,
  }
