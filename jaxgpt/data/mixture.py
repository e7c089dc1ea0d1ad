"""Mixture: the source of each row and the row's index within that source, from its global index.

Position p of the endless sequence of rows draws u(p) = (A p + b) mod M, where A / M is the
fractional part of the golden ratio (a Weyl sequence). [0, M) is divided into one interval per
source, in proportion to the weights:

  0                u(p)                     M
  |-- web 60% --|-- code 30% --|- math 10% -|
                   ^ row p comes from code

In n draws, the sequence visits each interval n times its length, up to O(log n). So each source
gets its share of every few batches, not only of the whole run.

The index of the row within its source is the number of earlier positions that drew the same
source: a difference of two sums of floors, which a variant of Euclid's algorithm computes in
O(log p). A position is thus placed without looking at its predecessors, and a mixture needs no
memory that grows with the data.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from jaxgpt.errors import UserError

_M = 1 << 62
_A = 2850178704830799621  # floor(M (sqrt(5) - 1) / 2); odd, so that u has the full period M


def floor_sum(n: int, m: int, a: int, b: int) -> int:
  """Computes the sum over 0 <= i < n of floor((a i + b) / m), exactly, in O(log n) steps.

  Args:
    n: Number of terms, at least 0.
    m: Divisor, at least 1.
    a: Slope, at least 0.
    b: Offset, at least 0.
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
  """Maps positions to (source, index within that source), with weights that may change.

  Attributes:
    num_sources: Number of sources.
  """

  def __init__(
    self,
    num_sources: int,
    weights: Sequence[float],
    changes: Sequence[tuple[int, Sequence[float]]] = (),
    seed: int = 0,
  ):
    """Checks and normalises the weights.

    Args:
      num_sources: Number of sources.
      weights: Share of the rows for each source, at least 0 and not all 0.
      changes: (position, weights) in rising order: the weights from each position on.
      seed: Any integer. It determines the order in which sources are drawn.

    Raises:
      UserError: The number of weights differs from the sources, one is negative, or all are zero.
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

  def counts(self, position: int) -> list[int]:
    """Rows of each source among the positions before `position`."""
    segment = int(np.searchsorted(self._starts, position, side="right")) - 1
    return [self._count(segment, source, position) for source in range(self.num_sources)]

  def _count(self, segment: int, source: int, position: int) -> int:
    """Rows of a source before a position in a segment (a range with constant weights)."""
    low, high = self._bounds[segment][source], self._bounds[segment][source + 1]
    inside = lambda n: self._below(high, n) - self._below(low, n)
    return self._before[segment][source] + inside(position) - inside(self._starts[segment])

  def _below(self, bound: int, n: int) -> int:
    """The number of draws below `bound` among the first n."""
    if not n or not bound:
      return 0
    if bound == _M:
      return n
    # u < bound exactly if floor((A p + b) / M) and floor((A p + b - bound) / M) differ. The
    # second floor is shifted by M to keep its argument positive, which adds 1 to each term.
    return floor_sum(n, _M, _A, self._b) - floor_sum(n, _M, _A, self._b - bound + _M) + n

  def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the sources of consecutive positions and the index of each row within its source.

    Args:
      first: The first position.
      count: Number of positions.

    Returns:
      (sources [count], indices [count]), int64.
    """
    sources, numbers = np.empty(count, np.int64), np.empty(count, np.int64)
    ends = [*self._starts[1:], first + count]
    for segment, (start, end) in enumerate(zip(self._starts, ends)):
      low, high = max(first, start), min(first + count, end)
      if low >= high:
        continue
      here = slice(low - first, high - first)
      sources[here] = chosen = self._draw(segment, low, high)
      for source in np.unique(chosen).tolist():
        of_source = np.nonzero(chosen == source)[0]
        numbers[here][of_source] = self._count(segment, source, low) + np.arange(len(of_source))
    return sources, numbers

  def _draw(self, segment: int, low: int, high: int) -> np.ndarray:
    """The sources of the positions low to high."""
    # M divides 2^64, so overflow of the unsigned product does not change the result mod M.
    position = np.uint64(low) + np.arange(high - low, dtype=np.uint64)
    u = (np.uint64(_A) * position + np.uint64(self._b)) & np.uint64(_M - 1)
    inner = np.array(self._bounds[segment][1:-1], np.uint64)
    return np.searchsorted(inner, u, side="right")


def _bounds(weights: Sequence[float], num_sources: int) -> list[int]:
  """The start of each source's interval of [0, M), followed by M: num_sources + 1 integers."""
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
  # The remainder of rounding goes to the last source with a weight.
  last = max(i for i, w in enumerate(weights) if w)
  return [0, *ends[:last], *[_M] * (num_sources - last)]
