"""Which weights stay: functions from scores to masks, True for a weight that is kept.

Ties are broken by position, so that a mask has exactly the wanted number of zeros.

I inputs, O outputs of a matrix.
"""

import math
from typing import NamedTuple

import numpy as np

from jaxgpt.analysis.compression.methods import UnsuitableError
from jaxgpt.errors import UserError


class Sparsity(NamedTuple):
  """How many weights are removed.

  Attributes:
    share: Share of the weights, in (0, 1).
    kept: N of an N:M pattern, or 0 without a pattern.
    group: M: of M weights in a row, along the inputs of an output, at most N are not zero.
  """

  share: float
  kept: int = 0
  group: int = 0

  def __str__(self) -> str:
    return f"{self.kept}:{self.group}" if self.group else f"{self.share:g}"


def parse(text: str) -> Sparsity:
  """Reads '0.5' or '2:4'.

  Raises:
    UserError: It is neither a share between 0 and 1, nor N:M with 0 < N < M.
  """
  n, colon, m = text.partition(":")
  try:
    if colon:
      kept, group = int(n), int(m)
      if 0 < kept < group:
        return Sparsity(1 - kept / group, kept, group)
    elif 0 < float(text) < 1:
      return Sparsity(float(text))
  except ValueError:
    pass
  raise UserError(
    f"--sparsity={text}: give the share of weights to remove, such as 0.5, or N:M to keep N of M "
    "weights in a row, such as 2:4"
  )


def largest(scores: np.ndarray, share: float) -> np.ndarray:
  """Keeps all but the `share` of the entries with the lowest scores, over the whole array."""
  kept = np.ones(scores.size, bool)
  kept[np.argsort(scores, axis=None, kind="stable")[: round(share * scores.size)]] = False
  return kept.reshape(scores.shape)


def largest_per_output(scores_IO: np.ndarray, share: float) -> np.ndarray:
  """Keeps, in each output, all but the `share` of the inputs with the lowest scores."""
  kept_IO = np.ones(scores_IO.shape, bool)
  order_IO = np.argsort(scores_IO, axis=0, kind="stable")
  np.put_along_axis(kept_IO, order_IO[: round(share * len(scores_IO))], False, axis=0)
  return kept_IO


def n_of_m(scores_IO: np.ndarray, kept: int, group: int) -> np.ndarray:
  """Keeps, in each output, the `kept` best of each `group` consecutive inputs."""
  inputs, outputs = scores_IO.shape
  groups = scores_IO.reshape(inputs // group, group, outputs)
  kept_GMO = np.ones(groups.shape, bool)
  order_GMO = np.argsort(groups, axis=1, kind="stable")
  np.put_along_axis(kept_GMO, order_GMO[:, : group - kept], False, axis=1)
  return kept_GMO.reshape(scores_IO.shape)


def by_scores(scores_IO: np.ndarray, sparsity: Sparsity, per_output: bool) -> np.ndarray:
  """The mask of one matrix.

  Args:
    scores_IO: The larger, the more important.
    sparsity: How many are removed.
    per_output: Without a pattern, compare the weights of each output among themselves.
  """
  if sparsity.group:
    return n_of_m(scores_IO, sparsity.kept, sparsity.group)
  compare = largest_per_output if per_output else largest
  return compare(scores_IO, sparsity.share)


def wanda_scores(weight_IO: np.ndarray, squares_I: np.ndarray) -> np.ndarray:
  """|W_ij| times the norm of input i over the calibration text (Wanda, arXiv:2306.11695, eq. 1).

  Args:
    weight_IO: The matrix.
    squares_I: Sum of the squares of each input.
  """
  return np.abs(weight_IO) * np.sqrt(squares_I)[:, None]


def check_groups(path: str, inputs: int, sparsity: Sparsity) -> None:
  """Raises an UnsuitableError if a pattern does not divide the inputs of a matrix."""
  if sparsity.group and inputs % sparsity.group:
    fitting = math.gcd(inputs, sparsity.group)
    raise UnsuitableError(
      f"--sparsity={sparsity}",
      f"{path} has {inputs} inputs, which {sparsity.group} does not divide (their common divisor "
      f"is {fitting})",
      "choose another pattern, or leave it out with --match",
    )
