"""Layouts with two documents per row, each in arrays of its own.

B rows of a batch, T positions in a row.
"""

from collections.abc import Sequence

import numpy as np

from jaxgpt.data import packing as packings
from jaxgpt.data import source
from jaxgpt.data.layouts.language_model import predictions
from jaxgpt.data.layouts.layout import Batch, Item, ReadRow, read


class Preference:
  """A preference pair per row: {'chosen': …, 'rejected': …}, each with the arrays of `CausalLM`.

  Row i of both holds the two answers to one prompt. An answer that is too long loses its end.
  """

  predicts_next = True
  predicts_tokens = False

  def index(
    self, split: source.Split, packing: str, seq_len: int
  ) -> tuple[packings.PackIndex, int]:
    """See `Layout`. Two consecutive documents fill one row, whatever `packing` says."""
    del packing
    docs = len(split.lengths)
    pack = packings.PackIndex(
      seq_len,
      np.arange(0, docs + 1, 2),
      np.arange(docs),
      np.zeros(docs, np.int64),
      np.minimum(split.lengths, seq_len),
    )
    return pack, int((split.lengths > seq_len).sum())

  def batch(self, items: Sequence[Item], num_rows: int, seq_len: int) -> Batch:
    """See `Layout`."""
    rows = read(items, 1)

    def one_side(row: ReadRow, side: int) -> ReadRow:
      doc, start, length = (a[side : side + 1] for a in row.spans)
      return ReadRow(row.split, (doc, start, length), row.tokens[side : side + 1])

    return {
      name: predictions([one_side(row, side) for row in rows], num_rows, seq_len)
      for side, name in enumerate(("chosen", "rejected"))
    }
