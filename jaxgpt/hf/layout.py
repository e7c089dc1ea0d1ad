"""How a published tensor lies next to ours: one line of text, read in both directions.

'(N H) D -> D N H' says that their matrix of N*H rows and D columns is our array [D, N, H]: a
letter for each dimension, dimensions merged by brackets, in their order and in ours.
"""

import functools
import math
import re


@functools.lru_cache(maxsize=1024)
def _parse(pattern):
  """((('N', 'H'), ('D',)), ((('D',), ('N',), ('H',))) of '(N H) D -> D N H'."""
  sides = [
    tuple(tuple((a or b).split()) for a, b in re.findall(r"\(([^)]*)\)|(\S+)", side))
    for side in pattern.split("->")
  ]
  theirs, ours = sides
  if sorted(sum(theirs, ())) != sorted(sum(ours, ())):
    raise ValueError(f"{pattern!r} has other letters on its two sides")
  return theirs, ours


def _sizes(pattern, our_shape, given):
  """Size of each letter; `given` tells what our shape does not."""
  _, ours = _parse(pattern)
  sizes = dict(given)
  for group, size in zip(ours, our_shape, strict=True):
    open_ = [x for x in group if x not in sizes]
    if len(open_) > 1:
      raise ValueError(f"{pattern!r}: the sizes of {open_} are not given")
    if open_:
      sizes[open_[0]] = size // math.prod(sizes[x] for x in group if x != open_[0])
  return sizes


class Layout:
  """One tensor (or one part of one) on their side and ours.

  Attributes:
    their_shape, our_shape: tuples.
    outer: which of our dimensions runs along the rows of theirs, so that a part of it is a part of
      the file.
  """

  def __init__(self, pattern, our_shape, **given):
    """Args: pattern: see above. our_shape: tuple. given: sizes of letters our shape leaves open."""
    self._theirs, self._ours = _parse(pattern)
    self._sizes = _sizes(pattern, our_shape, given)
    size = lambda group: math.prod(self._sizes[x] for x in group)
    self.our_shape = tuple(map(size, self._ours))
    self.their_shape = tuple(map(size, self._theirs))
    self.outer = next(i for i, group in enumerate(self._ours) if self._theirs[0][0] in group)

  @property
  def starts_alike(self):
    """Whether both begin with the same dimension: a matrix of ours, inputs first, stored as it is."""
    return self._theirs[0][0] == self._ours[0][0]

  def region(self, index):
    """What has to be read of theirs for a part of ours.

    Args:
      index: a (start, stop) for each of our dimensions.

    Returns:
      (region, convert): a (start, stop) for each of their dimensions, the smallest box that holds
      the part; and the function from that box's array to the part of ours.
    """
    wanted = {}
    for group, bounds in zip(self._ours, index, strict=True):
      wanted.update(_split_bounds(group, bounds, self._sizes))
    region, box_shape, cuts = [], [], {}
    for group in self._theirs:
      first, *rest = group
      inner = math.prod(self._sizes[x] for x in rest)
      start, stop = wanted[first]
      region.append((start * inner, stop * inner))
      box_shape += [stop - start, *(self._sizes[x] for x in rest)]
      cuts |= {first: slice(None), **{x: slice(*wanted[x]) for x in rest}}
    letters = sum(self._theirs, ())
    order = [letters.index(x) for x in sum(self._ours, ())]
    shape = tuple(stop - start for start, stop in index)

    def convert(box):
      box = box.reshape(box_shape)[tuple(cuts[x] for x in letters)]
      return box.transpose(order).reshape(shape)

    return tuple(region), convert

  def to_theirs(self, array):
    """Our whole array as theirs; for NumPy and JAX arrays."""
    letters = sum(self._ours, ())
    array = array.reshape([self._sizes[x] for x in letters])
    return array.transpose([letters.index(x) for x in sum(self._theirs, ())]).reshape(
      self.their_shape
    )


def _split_bounds(group, bounds, sizes):
  """Bounds of each letter of one of our dimensions; of a merged one only the whole is asked for."""
  if len(group) == 1:
    return {group[0]: bounds}
  if bounds != (0, math.prod(sizes[x] for x in group)):
    raise ValueError(f"a part of the merged dimension {group}")
  return {x: (0, sizes[x]) for x in group}
