"""Bootstrap intervals: against the normal approximation, seeded, and paired."""

import numpy as np
import pytest

from jaxgpt.tasks import bootstrap


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
  scores = np.random.default_rng(0).random(2000) < 0.8
  found = bootstrap.estimate(bootstrap.mean_of(scores), 2000)
  half = 1.96 * scores.std() / 2000**0.5
  assert found.value == scores.mean()
  np.testing.assert_allclose(
    (found.low, found.high), found.value + half * np.array([-1, 1]), atol=4e-3
  )


def test_intervals_are_seeded_and_narrow_with_the_level():
  mean = bootstrap.mean_of(np.arange(50) % 3)
  first, again, other = (bootstrap.estimate(mean, 50, 200, seed) for seed in (1, 1, 2))
  assert first == again != other
  wide, narrow = (bootstrap.estimate(mean, 50, level=level) for level in (0.99, 0.5))
  assert wide.low < narrow.low < narrow.high < wide.high


def test_a_measure_need_not_be_a_mean():
  values = np.random.default_rng(1).random(100)
  spread = lambda w: float(w @ values**2 / w.sum() - (w @ values / w.sum()) ** 2)
  found = bootstrap.estimate(spread, 100)
  assert found.value == pytest.approx(values.var())
  assert found.low < found.value < found.high


def test_paired_differences_are_narrower_than_independent_ones():
  rng = np.random.default_rng(2)
  easy = rng.random(500)  # an example's difficulty is common to both systems
  first, second = easy > 0.5, easy > 0.46
  found = bootstrap.difference(*map(bootstrap.mean_of, (first, second)), 500)
  assert found.value == pytest.approx(second.mean() - first.mean())
  assert 0 < found.low < found.value < found.high and found.p_value < 0.01
  alone = bootstrap.estimate(bootstrap.mean_of(first), 500)
  assert found.high - found.low < (alone.high - alone.low) / 2
  same = bootstrap.difference(*[bootstrap.mean_of(first)] * 2, 500)
  assert same == (0, 0, 0, 1)
