"""Metrics of retrieval: the rank of each query's passage. N queries, M passages, D dimensions."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxgpt.tasks.bootstrap import Measure, mean_of

_ROWS = 1024  # queries whose similarities are in memory at once


def ranks(queries: ArrayLike, passages: ArrayLike, right: Sequence[int]) -> np.ndarray:
  """The rank of each query's passage by cosine similarity, from 1. int64 [N].

  Passages as similar as the right one are ranked before it, so that a model that gives all texts
  one embedding does not look perfect.

  Args:
    queries: [N, D].
    passages: [M, D].
    right: For each query, the index of its passage.
  """
  normed = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  queries_ND = normed(np.asarray(queries, np.float64))
  passages_MD = normed(np.asarray(passages, np.float64))
  right_N, out = np.asarray(right, np.int64), []
  for start in range(0, len(queries_ND), _ROWS):
    similar = queries_ND[start : start + _ROWS] @ passages_MD.T
    own = np.take_along_axis(similar, right_N[start : start + _ROWS, None], axis=1)
    out.append((similar >= own - 1e-9).sum(1))
  return np.concatenate([*out, np.empty(0, np.int64)])


def recall_at(k: int, ranks_N: np.ndarray) -> Measure:
  """The share of queries whose passage is among the first k."""
  return mean_of(ranks_N <= k)


def mean_reciprocal_rank(ranks_N: np.ndarray) -> Measure:
  """The mean of 1 / rank."""
  return mean_of(1 / ranks_N)
