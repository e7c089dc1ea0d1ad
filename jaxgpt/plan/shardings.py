"""How a config's arrays are cut over a mesh: a table of all, and pictures of some."""

import math
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from jaxgpt import tree
from jaxgpt.config import MESH_AXES
from jaxgpt.model import transformer
from jaxgpt.parallel import sharding
from jaxgpt.training import build as build_lib

_SHOWN = 4  # parts of a dimension that a picture shows; of more, the first ones and the last
_DRAWN = ("embed", "attn/q", "attn/o", "mlp/up", "mlp/down", "head")


class Array(NamedTuple):
  """An array of a step.

  Attributes:
    name: path of a parameter, or what an activation is.
    dims: (logical axis or None, size) of each dimension.
    itemsize: bytes of a number.
  """

  name: str
  dims: tuple
  itemsize: int


class Cut(NamedTuple):
  """What a mesh makes of a dimension: into `parts`, over mesh `axes`."""

  axes: tuple
  parts: int


def parameters(c):
  """The `Array`s of a resolved config's parameters, in the order of their paths."""
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


def activations(c):
  """The `Array`s that a microbatch makes on its way through the model."""
  m = c.model
  rows, wide = c.data.batch_size // c.optim.accumulate, 2 if m.dtype == "bfloat16" else 4
  of = lambda name, axis, length, *dims, itemsize=wide: Array(
    name, ((axis, rows), (length, c.data.seq_len), *dims), itemsize
  )
  out = [
    of("tokens", "rows", "length", itemsize=4),
    of("between the blocks", "batch", "residual_length", ("act_embed", m.width)),
    of("queries", "batch", "length", ("act_heads", m.num_heads), (None, m.head_dim)),
    of("within the MLP", "batch", "length", ("act_mlp", m.mlp_width)),
  ]
  if m.head == "lm":
    out.append(of("logits", "rows", "length", ("act_vocab", m.vocab_size), itemsize=4))
  return out


def cut(array, sizes, rules):
  """For each dimension of an `Array` its `Cut`.

  Args:
    array: an `Array`.
    sizes: of the mesh, {axis: size}.
    rules: a `sharding.Rules`.
  """
  out = []
  for axis, size in array.dims:
    names = tuple(name for name in rules.mesh_axes(axis) if sizes[name] > 1)
    parts = math.prod(sizes[name] for name in names)
    out.append(Cut(names, parts) if size % parts == 0 else Cut((), 1))
  return out


def holders(array, sizes, rules):
  """Which devices hold which part: {index of the part in each dimension: [device, …]}.

  Devices are numbered by their place in the mesh, the last axis running fastest.
  """
  cuts, out = cut(array, sizes, rules), {}
  for place in np.ndindex(*(sizes[axis] for axis in MESH_AXES)):
    at = dict(zip(MESH_AXES, place, strict=True))
    index = []
    for one in cuts:
      part = 0
      for axis in one.axes:
        part = part * sizes[axis] + at[axis]
      index.append(part)
    number = int(np.ravel_multi_index(place, [sizes[axis] for axis in MESH_AXES]))
    out.setdefault(tuple(index), []).append(number)
  return out


def table(arrays, sizes, rules):
  """Lines: for each `Array` its dimensions, what they are cut over, and what a device holds."""
  rows = [("array", "dimensions", "cut over", "on a device", "MiB")]
  for array in arrays:
    cuts = cut(array, sizes, rules)
    part = [size // one.parts for (_, size), one in zip(array.dims, cuts, strict=True)]
    rows.append(
      (
        array.name,
        " x ".join(f"{axis or '-'} {size}" for axis, size in array.dims),
        ", ".join(
          f"{axis}: {' x '.join(one.axes)}"
          for (axis, _), one in zip(array.dims, cuts, strict=True)
          if one.axes
        )
        or "nothing",
        str(part).replace(" ", ""),
        f"{math.prod(part) * array.itemsize / 2**20:.2f}",
      )
    )
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return [
    "  ".join(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False))
    + "  "
    + row[-1].rjust(widths[-1])
    for row in rows
  ]


def picture(array, sizes, rules):
  """Lines: a box for each part of an `Array`, with the devices that hold it.

  The last two dimensions that are cut are drawn; of others, the first part.
  """
  cuts, parts = cut(array, sizes, rules), holders(array, sizes, rules)
  dims = [i for i, one in enumerate(cuts) if one.parts > 1][-2:]
  down, across = [None] * (2 - len(dims)) + dims
  if len(dims) == 1 and dims[0] != len(cuts) - 1:
    down, across = across, down
  numbers = lambda i: _some(range(1 if i is None else cuts[i].parts))
  label = lambda i: "" if i is None else f"{array.dims[i][0]} over {' x '.join(cuts[i].axes)}"

  def cell(row, column):
    if row is None or column is None:
      return "…"
    index = [0] * len(cuts)
    for i, part in ((down, row), (across, column)):
      if i is not None:
        index[i] = part
    return _ranges(parts[tuple(index)])

  grid = [[cell(row, column) for column in numbers(across)] for row in numbers(down)]
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
  return [title + (f"   {'   '.join(notes)}" if notes else "   whole on each"), *lines]


def describe(c, sizes):
  """Lines: the tables of all arrays of a resolved config on a mesh, and pictures of some.

  Raises:
    UserError: the mesh does not divide what it has to, as training says.
  """
  weights, values, rules = parameters(c), activations(c), sharding.rules(c.mesh)
  mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
  model = transformer.Transformer(ml_collections.FrozenConfigDict(c.model), None, rules)
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


def _some(numbers):
  """The numbers, or the first ones, None and the last."""
  numbers = list(numbers)
  return numbers if len(numbers) <= _SHOWN else [*numbers[: _SHOWN - 2], None, numbers[-1]]


def _ranges(numbers):
  """'0-3' of [0, 1, 2, 3], '0 8 … 56' of many with gaps."""
  runs = []
  for number in numbers:
    if runs and number == runs[-1][1] + 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  texts = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs]
  return " ".join("…" if text is None else text for text in _some(texts))
