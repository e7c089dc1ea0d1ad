"""Which source a position of the endless sequence of rows comes from, by weight.

Position p draws u(p) = (A p + b) mod M, with A / M the golden ratio's fraction: a Weyl sequence,
which visits any interval as often as its length says to within O(log n) of n draws. The intervals
are the sources' weights. How often a source was drawn before p is a difference of two sums of
floors, which Euclid's algorithm adds up in O(log p): so a position is placed without its
predecessors, and a mixture holds nothing that grows with its rows.
"""

import itertools

import numpy as np

from jaxgpt.errors import UserError

_M = 1 << 62
_A = 2850178704830799621  # floor(M (sqrt(5) - 1) / 2); odd, so that u has the full period M


def floor_sum(n, m, a, b):
  """The sum over 0 <= i < n of floor((a i + b) / m), exactly, in O(log n) steps.

  Args:
    n, a, b: integers of at least 0.
    m: an integer of at least 1.
  """
  total = 0
  while n:
    total += (n - 1) * n // 2 * (a // m) + n * (b // m)
    a, b = a % m, b % m
    top = a * n + b
    n, b = divmod(top, m)
    m, a = a, m
  return total


class Mixture:
  """Positions to (source, number within that source), for weights that may change on the way.

  Attributes:
    num_sources: sources.
  """

  def __init__(self, num_sources, weights, changes=(), seed=0):
    """Checks and normalises the weights.

    Args:
      num_sources: sources.
      weights: shares of the rows, one a source; at least 0, not all 0.
      changes: [(position, weights)] that hold from those positions on, in rising order.
      seed: an integer; another one draws the sources in another order.

    Raises:
      UserError: weights of another number than the sources, negative, or all zero.
    """
    self.num_sources = num_sources
    self._b = int(np.random.SeedSequence(seed % 2**64).generate_state(1, np.uint64)[0]) % _M
    self._starts = [0]
    self._bounds = [_bounds(weights, self.num_sources)]
    self._before = [[0] * self.num_sources]  # rows of each source before a segment
    for position, new in changes:
      before = self.counts(position)
      self._starts.append(position)
      self._bounds.append(_bounds(new, self.num_sources))
      self._before.append(before)

  def counts(self, position):
    """Rows of each source among the positions before `position`: a list of integers."""
    segment = np.searchsorted(self._starts, position, side="right") - 1
    return [self._count(segment, source, position) for source in range(self.num_sources)]

  def _count(self, segment, source, position):
    low, high = self._bounds[segment][source], self._bounds[segment][source + 1]
    inside = lambda n: self._below(high, n) - self._below(low, n)
    return self._before[segment][source] + inside(position) - inside(self._starts[segment])

  def _below(self, bound, n):
    """How many of the first n draws are below `bound`."""
    if not n or not bound:
      return 0
    if bound == _M:
      return n
    return floor_sum(n, _M, _A, self._b) - floor_sum(n, _M, _A, self._b - bound + _M) + n

  def locate(self, first, count):
    """The sources of consecutive positions, and the number of each row within its source.

    Args:
      first: a position.
      count: positions.

    Returns:
      (sources [count], numbers [count]), int64.
    """
    sources, numbers = np.empty(count, np.int64), np.empty(count, np.int64)
    ends = [*self._starts[1:], first + count]
    for segment, (start, end) in enumerate(zip(self._starts, ends)):
      low, high = max(first, start), min(first + count, end)
      if low >= high:
        continue
      part = slice(low - first, high - first)
      sources[part] = chosen = self._draw(segment, low, high)
      for source in np.unique(chosen).tolist():
        of_source = np.nonzero(chosen == source)[0]
        numbers[part][of_source] = self._count(segment, source, low) + np.arange(len(of_source))
    return sources, numbers

  def _draw(self, segment, low, high):
    # Multiples of 2^64 are multiples of M, so wrapping around changes nothing.
    position = np.uint64(low) + np.arange(high - low, dtype=np.uint64)
    u = (np.uint64(_A) * position + np.uint64(self._b)) & np.uint64(_M - 1)
    inner = np.array(self._bounds[segment][1:-1], np.uint64)
    return np.searchsorted(inner, u, side="right")


def _bounds(weights, num_sources):
  """Where each source's interval of [0, M) begins, and M: num_sources + 1 integers."""
  weights = [float(w) for w in weights]
  if len(weights) != num_sources:
    raise UserError(
      f"{len(weights)} weights {tuple(weights)} for {num_sources} sources; data.weights "
      "and each of data.weight_changes need one weight for each folder of data.path"
    )
  if not all(w >= 0 and w < float("inf") for w in weights) or not sum(weights) > 0:
    raise UserError(f"weights {tuple(weights)}: each must be at least 0, and one above 0")
  total = sum(weights)
  ends = [min(round(_M * (end / total)), _M) for end in itertools.accumulate(weights)]
  # What rounding leaves over belongs to the last source that is drawn at all.
  last = max(i for i, w in enumerate(weights) if w)
  return [0, *ends[:last], *[_M] * (num_sources - last)]
