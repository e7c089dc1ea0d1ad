"""Bootstrap confidence intervals of metrics (Efron 1979), also of metrics that are not means.

A metric is a function of how often each example counts. Its value on the data counts each example
once. A resample of the data counts some examples several times and others not at all:

    examples      1  2  3  4  5      metric
    the data      1  1  1  1  1      0.71      the value
    resample 1    0  2  1  1  1      0.74
    resample 2    1  0  3  0  1      0.66      the interval: percentiles over all resamples

Accuracy is then a weighted mean, and BLEU a ratio of weighted sums of n-gram counts: one rule for
both. N is the number of examples.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 1000
LEVEL = 0.95

# f(weights): the value of a metric if example i counts weights[i] times, float64 [N].
Measure: TypeAlias = Callable[[np.ndarray], float]


class Estimate(NamedTuple):
  """A metric's value on the data, and its confidence interval."""

  value: float
  low: float
  high: float

  def __str__(self) -> str:
    return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def mean_of(scores: ArrayLike) -> Measure:
  """The measure that is the mean of a score of each example."""
  scores_N = np.asarray(scores, np.float64)
  return lambda weights_N: float(weights_N @ scores_N / weights_N.sum())


def resamples(size: int, count: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
  """Yields the weights of the examples in each resample, float64 [N].

  Args:
    size: N.
    count: Number of resamples.
    seed: Seed of the draws. Two metrics with the same seed see the same resamples.
  """
  rng = np.random.default_rng(seed)
  for _ in range(count):
    yield np.bincount(rng.integers(0, size, size), minlength=size).astype(np.float64)


def estimate(
  measure: Measure, size: int, count: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Estimate:
  """A metric with its percentile interval.

  Example:
    >>> estimate(mean_of([1, 1, 0, 1]), 4)
    Estimate(value=0.75, low=0.25, high=1.0)

  Args:
    measure: The metric.
    size: N, at least 1.
    count: Number of resamples.
    seed: Seed of the draws.
    level: Probability that the interval covers the value on new data.
  """
  drawn = [measure(weights_N) for weights_N in resamples(size, count, seed)]
  low, high = percentiles(drawn, level)
  return Estimate(measure(np.ones(size)), low, high)


def percentiles(drawn: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
  """The percentiles that cut off (1 - level) / 2 of some values on each side."""
  edges = (1 - level) / 2
  low, high = np.quantile(np.asarray(drawn, np.float64), [edges, 1 - edges])
  return float(low), float(high)


class Difference(NamedTuple):
  """The difference of two systems on the same examples.

  Attributes:
    value: The second system's metric minus the first's.
    low, high: Its interval.
    p_value: Two-sided: twice the smaller share of resamples whose difference is on the other side
      of 0, at most 1.
  """

  value: float
  low: float
  high: float
  p_value: float


def difference(
  first: Measure,
  second: Measure,
  size: int,
  count: int = RESAMPLES,
  seed: int = 0,
  level: float = LEVEL,
) -> Difference:
  """The paired bootstrap of two systems on the same examples (Koehn 2004).

  Args:
    first, second: The metric of each system.
    size: N.
    count: Number of resamples.
    seed: Seed of the draws.
    level: As in `estimate`.
  """
  drawn = np.array([second(w) - first(w) for w in resamples(size, count, seed)])
  low, high = percentiles(drawn, level)
  ones = np.ones(size)
  # A resample without difference speaks for neither side; one is added so that p is never 0.
  tail = min((drawn <= 0).sum(), (drawn >= 0).sum()) + 1
  return Difference(second(ones) - first(ones), low, high, min(1.0, 2 * float(tail) / (count + 1)))
