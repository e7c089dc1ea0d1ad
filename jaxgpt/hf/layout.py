"""Axis order of a published tensor and of our array, as one line that is read in both directions.

'(N H) D -> D N H' means: their matrix of N*H rows and D columns is our array [D, N, H]. Each letter
is an axis, and axes in brackets are flattened into one, in that order. The pattern is that of
`einops.rearrange`.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Bounds = tuple[int, int]  # [start, stop) along an axis
_Axes = tuple[str, ...]  # letters that are flattened into one axis


@functools.lru_cache(maxsize=1024)
def _parse(pattern: str) -> tuple[tuple[_Axes, ...], tuple[_Axes, ...]]:
  """Parses '(N H) D -> D N H' into ((('N', 'H'), ('D',)), (('D',), ('N',), ('H',)))."""
  theirs, ours = [
    tuple(tuple((a or b).split()) for a, b in re.findall(r"\(([^)]*)\)|(\S+)", side))
    for side in pattern.split("->")
  ]
  if sorted(_letters(theirs)) != sorted(_letters(ours)):
    raise ValueError(f"{pattern!r}: the letters on the two sides differ")
  return theirs, ours


def _letters(axes: tuple[_Axes, ...]) -> _Axes:
  return tuple(letter for group in axes for letter in group)


def _sizes(pattern: str, our_shape: Sequence[int], given: dict[str, int]) -> dict[str, int]:
  """Returns the size of each letter. `given` has those that our shape leaves open."""
  _, ours = _parse(pattern)
  sizes = dict(given)
  for group, size in zip(ours, our_shape, strict=True):
    unknown = [x for x in group if x not in sizes]
    if len(unknown) > 1:
      raise ValueError(f"{pattern!r}: the sizes of {unknown} are not given")
    if unknown:
      sizes[unknown[0]] = size // math.prod(sizes[x] for x in group if x != unknown[0])
  return sizes


class Region(NamedTuple):
  """The box of a published tensor that holds a box of ours.

  Attributes:
    bounds: [start, stop) along each of their axes. The smallest such box.
    convert: Function from the array in that box to the array in the box of ours.
  """

  bounds: tuple[Bounds, ...]
  convert: Callable[[np.ndarray], np.ndarray]


class Layout:
  """A published tensor (or a piece of one) and the same values as our array.

  Attributes:
    their_shape: Shape of the published tensor.
    our_shape: Shape of our array.
    outer: Our axis that varies slowest in the file. A slice of it is contiguous in the file.
  """

  def __init__(self, pattern: str, our_shape: Sequence[int], **given: int):
    """Parses a pattern.

    Args:
      pattern: See the module's docstring.
      our_shape: Shape of our array.
      **given: Sizes of letters that `our_shape` leaves open.
    """
    self._theirs, self._ours = _parse(pattern)
    self._sizes = _sizes(pattern, our_shape, given)
    size = lambda group: math.prod(self._sizes[x] for x in group)
    self.our_shape: tuple[int, ...] = tuple(map(size, self._ours))
    self.their_shape: tuple[int, ...] = tuple(map(size, self._theirs))
    self.outer: int = next(i for i, group in enumerate(self._ours) if self._theirs[0][0] in group)

  @property
  def inputs_first(self) -> bool:
    """Whether both sides begin with the same axis, as a matrix stored [in, out] does."""
    return self._theirs[0][0] == self._ours[0][0]

  def region(self, index: Sequence[Bounds]) -> Region:
    """Finds the box of the published tensor to read for a box of our array.

    Args:
      index: [start, stop) along each of our axes.
    """
    # Their axis (N H) is cut along its first letter alone: a box [n0, n1) x [h0, h1) of ours reads
    # rows n0 * H to n1 * H of theirs, and `convert` cuts [h0, h1) out of that.
    wanted: dict[str, Bounds] = {}
    for group, axis_bounds in zip(self._ours, index, strict=True):
      wanted.update(_split_bounds(group, axis_bounds, self._sizes))
    bounds: list[Bounds] = []
    box_shape: list[int] = []
    cuts: dict[str, slice] = {}
    for first, *rest in self._theirs:
      inner = math.prod(self._sizes[x] for x in rest)
      start, stop = wanted[first]
      bounds.append((start * inner, stop * inner))
      box_shape += [stop - start, *(self._sizes[x] for x in rest)]
      cuts |= {first: slice(None), **{x: slice(*wanted[x]) for x in rest}}
    letters = _letters(self._theirs)
    order = [letters.index(x) for x in _letters(self._ours)]
    shape = tuple(stop - start for start, stop in index)

    def convert(box: np.ndarray) -> np.ndarray:
      box = box.reshape(box_shape)[tuple(cuts[x] for x in letters)]
      return box.transpose(order).reshape(shape)

    return Region(tuple(bounds), convert)

  def to_theirs(self, array: Any) -> Any:
    """Converts our whole array, of NumPy or JAX, to the published axis order."""
    letters = _letters(self._ours)
    array = array.reshape([self._sizes[x] for x in letters])
    order = [letters.index(x) for x in _letters(self._theirs)]
    return array.transpose(order).reshape(self.their_shape)


def _split_bounds(group: _Axes, bounds: Bounds, sizes: dict[str, int]) -> dict[str, Bounds]:
  """Returns the bounds of each letter of one of our axes. A flattened axis is read as a whole."""
  if len(group) == 1:
    return {group[0]: bounds}
  if bounds != (0, math.prod(sizes[x] for x in group)):
    raise ValueError(f"a slice of the flattened axis {group}")
  return {x: (0, sizes[x]) for x in group}
