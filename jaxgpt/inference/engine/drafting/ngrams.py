"""Drafts from the text itself: the tokens that followed its last ones where they stood before.

Texts that repeat their prompt have many such places: answers on a document, edits of code. It needs
no model (prompt lookup; the same idea is arXiv:2304.04487).
"""

from collections.abc import Sequence

import jax
import numpy as np

from jaxgpt.inference.engine.drafting.acceptance import Drafts
from jaxgpt.inference.engine.rows import Row

_LONGEST = 3  # last tokens that are looked for, then fewer


class Ngrams:
  """A drafter without a model. See `drafter.Drafter`."""

  def __init__(self, num_rows: int, most: int):
    """Keeps its arguments.

    Args:
      num_rows: Rows of the engine.
      most: K.
    """
    self._num_rows, self.most = num_rows, most

  def prefill(self, parts: Sequence[tuple[Row, int]], length: int) -> None:
    """See `drafter.Drafter`."""

  def draft(
    self, rows: Sequence[tuple[int, Row]], room_B: np.ndarray, seen: tuple[jax.Array, jax.Array]
  ) -> Drafts | None:
    """See `drafter.Drafter`."""
    del seen
    B = self._num_rows
    tokens_BK, num_B = np.zeros((B, self.most), np.int32), np.zeros(B, np.int32)
    for b, row in rows:
      if room_B[b]:
        found = following([*row.request.prompt, *row.written], int(room_B[b]))
        tokens_BK[b, : len(found)], num_B[b] = found, len(found)
    # With several rows the same program runs whether any has a draft or not: a row's bits must not
    # depend on the others.
    return Drafts(tokens_BK, num_B) if num_B.any() or self._num_rows > 1 else None


def following(tokens: Sequence[int], most: int) -> np.ndarray:
  """What followed the last tokens of a text where they stood before.

  The longest match counts, and of several the latest that enough tokens follow.

  Args:
    tokens: The text so far.
    most: Most tokens to return.

  Returns:
    int32 [at most `most`], empty if there is no such place.
  """
  array = np.asarray(tokens, np.int32)
  for n in range(min(_LONGEST, len(array) - 1), 0, -1):
    windows = np.lib.stride_tricks.sliding_window_view(array[:-1], n)
    after = np.flatnonzero((windows == array[-n:]).all(1)) + n
    if len(after):
      enough = after[after + most <= len(array)]
      start = enough[-1] if len(enough) else after[0]
      return array[start : start + most]
  return array[:0]
