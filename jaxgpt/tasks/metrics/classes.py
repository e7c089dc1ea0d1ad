"""Metrics of predicted classes, sets of classes and numbers. N examples, C classes."""

from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from jaxgpt.run.process import text_table
from jaxgpt.tasks.bootstrap import Measure, mean_of


class Confusion(NamedTuple):
  """How often each class was predicted for each class.

  Attributes:
    names: The classes, sorted: those of the references and of the predictions.
    counts_CC: Examples by class (row) and predicted class (column).
  """

  names: list[str]
  counts_CC: np.ndarray

  def lines(self) -> list[str]:
    """The matrix as a table, whose rows are the classes of the references."""
    rows = zip(self.names, self.counts_CC.tolist(), strict=True)
    return text_table.lines(["", *self.names], [[name, *row] for name, row in rows])


def _numbered(
  predicted: Sequence[str], wanted: Sequence[str]
) -> tuple[list[str], np.ndarray, np.ndarray]:
  """(names, number of each prediction, number of each reference)."""
  names = sorted({*predicted, *wanted})
  number = {name: i for i, name in enumerate(names)}
  as_array = lambda labels: np.array([number[label] for label in labels], np.int64)
  return names, as_array(predicted), as_array(wanted)


def confusion(predicted: Sequence[str], wanted: Sequence[str]) -> Confusion:
  """The confusion matrix of N examples.

  Args:
    predicted: Predicted classes.
    wanted: Classes of the references.
  """
  names, predicted_N, wanted_N = _numbered(predicted, wanted)
  counts_CC = np.zeros((len(names), len(names)), np.int64)
  np.add.at(counts_CC, (wanted_N, predicted_N), 1)
  return Confusion(names, counts_CC)


def accuracy(predicted: Sequence[Hashable], wanted: Sequence[Hashable]) -> Measure:
  """The share of predictions that equal their references."""
  return mean_of([p == w for p, w in zip(predicted, wanted, strict=True)])


def macro_f1(predicted: Sequence[str], wanted: Sequence[str]) -> Measure:
  """The mean of the classes' F1, as scikit-learn's `f1_score(average="macro")`.

  F1 of a class is 2 TP / (2 TP + FP + FN). A class that a resample of the examples neither holds
  nor predicts does not count in it.
  """
  names, predicted_N, wanted_N = _numbered(predicted, wanted)
  is_right_N = predicted_N == wanted_N

  def measure(weights_N: np.ndarray) -> float:
    count = lambda numbers, w: np.bincount(numbers, w, minlength=len(names))
    right_C = count(wanted_N, weights_N * is_right_N)
    either_C = count(predicted_N, weights_N) + count(wanted_N, weights_N)
    there_C = either_C > 0
    return float((2 * right_C[there_C] / either_C[there_C]).mean())

  return measure


def micro_f1(predicted: Sequence[Collection[str]], wanted: Sequence[Collection[str]]) -> Measure:
  """F1 over all (example, class) pairs of sets of classes; 1 if there are none at all."""
  pairs = [(set(p), set(w)) for p, w in zip(predicted, wanted, strict=True)]
  return f1_of_counts(
    [len(p & w) for p, w in pairs], [len(p) for p, _ in pairs], [len(w) for _, w in pairs]
  )


def f1_of_counts(right: Sequence[int], predicted: Sequence[int], wanted: Sequence[int]) -> Measure:
  """F1 = 2 right / (predicted + wanted), of the sums over the examples; 1 if both are 0."""
  right_N = np.asarray(right, np.float64)
  total_N = np.asarray(predicted, np.float64) + np.asarray(wanted, np.float64)

  def measure(weights_N: np.ndarray) -> float:
    total = weights_N @ total_N
    return float(2 * (weights_N @ right_N) / total) if total else 1.0

  return measure


def mean_squared_error(predicted: Sequence[float], wanted: Sequence[float]) -> Measure:
  """The mean of the squared differences."""
  return mean_of(np.square(np.subtract(predicted, wanted)))


def pearson(predicted: Sequence[float], wanted: Sequence[float]) -> Measure:
  """Pearson's correlation; 0 where one side does not vary."""
  predicted_N, wanted_N = np.asarray(predicted, np.float64), np.asarray(wanted, np.float64)

  def measure(weights_N: np.ndarray) -> float:
    share_N = weights_N / weights_N.sum()
    p_N, w_N = predicted_N - share_N @ predicted_N, wanted_N - share_N @ wanted_N
    spread = np.sqrt((share_N @ p_N**2) * (share_N @ w_N**2))
    return float(share_N @ (p_N * w_N) / spread) if spread > 0 else 0.0

  return measure
