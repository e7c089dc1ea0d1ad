"""Drawings of shardings (`jaxgpt plan --shardings`): a table of all arrays, pictures of some."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import jax
import ml_collections
import numpy as np

from jaxgpt import tree
from jaxgpt.config import MESH_AXES
from jaxgpt.config.keys.layer_kinds import mlp_kinds
from jaxgpt.model import transformer
from jaxgpt.model.experts import capacity
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel import sharding
from jaxgpt.training import build as build_lib

T = TypeVar("T")

_SHOWN = 4  # most shards of a dimension in a picture; of more, the first ones and the last
_DRAWN = ("embed", "attn/q", "attn/o", "mlp/up", "mlp/down", "head")


class Array(NamedTuple):
  """A parameter or activation.

  Attributes:
    name: Path of the parameter, or name of the activation.
    dims: (logical axis or None, size) of each dimension.
    itemsize: Bytes per number.
  """

  name: str
  dims: tuple[tuple[str | None, int], ...]
  itemsize: int


class Split(NamedTuple):
  """The sharding of one dimension.

  Attributes:
    axes: Mesh axes that shard it.
    shards: Number of shards.
  """

  axes: tuple[str, ...]
  shards: int


def parameters(c: ml_collections.ConfigDict) -> list[Array]:
  """The parameters of a resolved config, in the order of their paths."""
  shapes, axes = transformer.abstract(
    transformer.Transformer(ml_collections.FrozenConfigDict(c.model))
  )
  shapes, axes = tree.flatten(shapes), tree.flatten(axes, is_leaf=sharding.is_axes)
  return [
    Array(
      name, tuple(zip(axes[name], shapes[name].shape, strict=True)), shapes[name].dtype.itemsize
    )
    for name in shapes
  ]


def activations(c: ml_collections.ConfigDict) -> list[Array]:
  """The main activations of a microbatch, in the order of the forward pass."""
  m = c.model
  rows, wide = c.data.batch_size // c.optim.accumulate, 2 if m.dtype == "bfloat16" else 4
  of = lambda name, axis, length, *dims, itemsize=wide: Array(
    name, ((axis, rows), (length, c.data.seq_len), *dims), itemsize
  )
  out = [
    of("tokens", "rows", "length", itemsize=4),
    of("between the blocks", "batch", "residual_length", ("act_embed", m.width)),
    of("queries", "batch", "length", ("act_heads", m.num_heads), (None, m.head_dim)),
  ]
  inside = lambda name, width: of(name, "batch", "length", ("act_mlp", width))
  kinds = mlp_kinds(m)
  if "dense" in kinds:
    out.append(inside("within the MLP", m.mlp_width))
  if "moe" in kinds:
    if m.moe.capacity:
      slots = (("experts", m.moe.experts), (None, capacity.slots(m.moe, c.data.seq_len)))
      dims = (("expert_batch", rows), *slots, ("act_mlp", m.moe.width))
      out.append(Array("within the experts", dims, wide))
    else:  # how many rows an expert gets depends on the data
      pairs = ((None, m.moe.per_token), (None, m.width))
      out.append(of("results of the experts", "batch", "length", *pairs))
    if m.moe.shared:
      out.append(inside("within the shared experts", m.moe.shared * m.moe.width))
  if m.head == "lm":
    out.append(of("logits", "rows", "length", ("act_vocab", m.vocab_size), itemsize=4))
  return out


def split(array: Array, sizes: Mapping[str, int], rules: sharding.Rules) -> list[Split]:
  """The sharding of each dimension of an array.

  Args:
    array: The array.
    sizes: Sizes of the mesh axes, {axis: size}.
    rules: Logical axis rules.
  """
  out = []
  for axis, size in array.dims:
    names = tuple(name for name in rules.mesh_axes(axis) if sizes[name] > 1)
    shards = math.prod(sizes[name] for name in names)
    out.append(Split(names, shards) if size % shards == 0 else Split((), 1))
  return out


def holders(
  array: Array, sizes: Mapping[str, int], rules: sharding.Rules
) -> dict[tuple[int, ...], list[int]]:
  """The devices that hold each shard: {index of the shard in each dimension: [device, ...]}.

  Devices are numbered by their place in the mesh, with the last mesh axis varying fastest.
  """
  splits = split(array, sizes, rules)
  out: dict[tuple[int, ...], list[int]] = {}
  for place in np.ndindex(*(sizes[axis] for axis in MESH_AXES)):
    at = dict(zip(MESH_AXES, place, strict=True))
    # The index of the shard in a dimension is the device's place along that dimension's mesh axes,
    # as digits of a number with one base per axis.
    index = []
    for one in splits:
      shard = 0
      for axis in one.axes:
        shard = shard * sizes[axis] + at[axis]
      index.append(shard)
    number = int(np.ravel_multi_index(place, [sizes[axis] for axis in MESH_AXES]))
    out.setdefault(tuple(index), []).append(number)
  return out


def table(arrays: Iterable[Array], sizes: Mapping[str, int], rules: sharding.Rules) -> list[str]:
  """Lines with the dimensions of each array, their mesh axes, and its shape and size per device."""
  lines = [("array", "dimensions", "sharded over", "per device", "MiB")]
  for array in arrays:
    splits = split(array, sizes, rules)
    shape = [size // one.shards for (_, size), one in zip(array.dims, splits, strict=True)]
    lines.append(
      (
        array.name,
        " x ".join(f"{axis or '-'} {size}" for axis, size in array.dims),
        ", ".join(
          f"{axis}: {' x '.join(one.axes)}"
          for (axis, _), one in zip(array.dims, splits, strict=True)
          if one.axes
        )
        or "nothing",
        str(shape).replace(" ", ""),
        f"{math.prod(shape) * array.itemsize / 2**20:.2f}",
      )
    )
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return [
    "  ".join(cell.ljust(width) for cell, width in zip(line[:-1], widths, strict=False))
    + "  "
    + line[-1].rjust(widths[-1])
    for line in lines
  ]


def picture(array: Array, sizes: Mapping[str, int], rules: sharding.Rules) -> list[str]:
  """Lines with a box for each shard of an array, with the devices that hold it.

  The last two sharded dimensions are drawn. Of other sharded dimensions, only the first shard is.
  """
  splits, held = split(array, sizes, rules), holders(array, sizes, rules)
  dims = [i for i, one in enumerate(splits) if one.shards > 1][-2:]
  down: int | None = dims[0] if len(dims) == 2 else None
  across: int | None = dims[-1] if dims else None
  if len(dims) == 1 and dims[0] != len(splits) - 1:
    down, across = across, down
  numbers = lambda i: _some(range(1 if i is None else splits[i].shards))
  label = lambda i: "" if i is None else f"{array.dims[i][0]} over {' x '.join(splits[i].axes)}"

  def cell(line: int | None, column: int | None) -> str:
    if line is None or column is None:
      return "…"
    index = [0] * len(splits)
    for i, shard in ((down, line), (across, column)):
      if i is not None:
        index[i] = shard
    return _ranges(held[tuple(index)])

  grid = [[cell(line, column) for column in numbers(across)] for line in numbers(down)]
  widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
  bar = lambda left, middle, right: left + middle.join("─" * (w + 2) for w in widths) + right
  lines = [bar("┌", "┬", "┐")]
  for i, line in enumerate(grid):
    if i:
      lines.append(bar("├", "┼", "┤"))
    lines.append(
      "│" + "│".join(f" {text.ljust(w)} " for text, w in zip(line, widths, strict=True)) + "│"
    )
  lines.append(bar("└", "┴", "┘"))
  title = f"{array.name} [{', '.join(str(size) for _, size in array.dims)}]"
  notes = [f"{arrow} {label(i)}" for arrow, i in (("↓", down), ("→", across)) if i is not None]
  return [title + (f"   {'   '.join(notes)}" if notes else "   replicated"), *lines]


def describe(c: ml_collections.ConfigDict, sizes: Mapping[str, int], platform: str) -> list[str]:
  """Lines with tables of all arrays of a resolved config on a mesh, and pictures of some.

  Args:
    c: The resolved config.
    sizes: Sizes of the mesh axes, {axis: size}.
    platform: Platform of the devices, as JAX names it.

  Raises:
    UserError: The mesh does not divide rows, layers or a dimension that it has to, with training's
      message. Also raised if the attention does not run on these devices.
  """
  weights, values, rules = parameters(c), activations(c), sharding.rules(c.mesh)
  mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
  mesh_lib.check_batch(sizes, c.data.batch_size, c.optim.accumulate)
  mesh_lib.check_batch(sizes, c.eval.batch_size, key="eval.batch_size")
  model = build_lib.model_on(c, sizes, platform)
  shapes, axes = transformer.abstract(model)
  sharding.params_shardings(axes, shapes, mesh, rules)
  build_lib.check_heads(model, mesh)
  used = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
  lines = [f"mesh: {used}", "", *table(weights, sizes, rules), "", *table(values, sizes, rules)]
  drawn = [
    array
    for end in _DRAWN
    for array in weights
    if array.name == end or array.name.endswith("/" + end)
  ]
  for array in drawn + values:
    lines += ["", *picture(array, sizes, rules)]
  return lines


def _some(items: Iterable[T]) -> list[T | None]:
  """All items if they are few, otherwise the first ones, None and the last."""
  numbers: list[T | None] = list(items)
  return numbers if len(numbers) <= _SHOWN else [*numbers[: _SHOWN - 2], None, numbers[-1]]


def _ranges(numbers: Iterable[int]) -> str:
  """Sorted numbers as text: [0, 1, 2, 3] becomes '0-3', many with gaps '0 8 … 56'."""
  runs: list[list[int]] = []
  for number in numbers:
    if runs and number == runs[-1][1] + 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  texts = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs]
  return " ".join("…" if text is None else text for text in _some(texts))
