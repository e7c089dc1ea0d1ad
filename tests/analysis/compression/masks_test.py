"""Masks, against loops that do what the definitions say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.analysis.compression import masks
from jaxgpt.errors import UserError

SCORES = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).random((16, 6)))


@settings(max_examples=20, deadline=None)
@given(SCORES, st.floats(0.01, 0.99))
def test_the_lowest_scores_of_all_or_of_an_output_are_removed(scores_IO, share):
  kept_IO = masks.largest(scores_IO, share)
  removed = sorted(scores_IO.ravel())[: round(share * scores_IO.size)]
  assert sorted(scores_IO[~kept_IO]) == removed
  kept_IO = masks.largest_per_output(scores_IO, share)
  for o in range(6):
    assert sorted(scores_IO[~kept_IO[:, o], o]) == sorted(scores_IO[:, o])[: round(share * 16)]


@settings(max_examples=20, deadline=None)
@given(SCORES, st.sampled_from([(2, 4), (4, 8), (1, 4), (3, 16)]))
def test_a_pattern_holds_in_every_group(scores_IO, pattern):
  n, m = pattern
  kept_IO = masks.n_of_m(scores_IO, n, m)
  for o in range(6):
    for first in range(0, 16, m):
      group, kept = scores_IO[first : first + m, o], kept_IO[first : first + m, o]
      assert sorted(group[kept]) == sorted(group)[m - n :]


def test_equal_scores_are_removed_by_position_and_exactly_as_many_as_asked():
  assert masks.largest(np.zeros((2, 3)), 0.5).tolist() == [[False] * 3, [True] * 3]
  assert masks.n_of_m(np.zeros((4, 1)), 2, 4).ravel().tolist() == [False, False, True, True]


def test_wanda_scores_are_the_weight_times_the_norm_of_its_input():
  rng = np.random.default_rng(0)
  weight_IO, x_TI = rng.normal(size=(5, 3)), rng.normal(size=(7, 5))
  scores_IO = masks.wanda_scores(weight_IO, (x_TI**2).sum(0))
  for i in range(5):
    for o in range(3):
      norm = math.sqrt(sum(x_TI[t, i] ** 2 for t in range(7)))
      assert scores_IO[i, o] == pytest.approx(abs(weight_IO[i, o]) * norm)


def test_sparsities_are_read_or_refused():
  assert masks.parse("0.25") == (0.25, 0, 0)
  assert masks.parse("2:4") == (0.5, 2, 4) and str(masks.parse("4:8")) == "4:8"
  for text in ("0", "1", "4:2", "0:4", "half", "2:", "nan"):
    with pytest.raises(UserError, match=f"--sparsity={text}: give the share"):
      masks.parse(text)
  with pytest.raises(UserError, match="layers/attn/q has 30 inputs, which 4 does not divide"):
    masks.check_groups("layers/attn/q", 30, masks.parse("2:4"))
