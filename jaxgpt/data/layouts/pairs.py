"""Layouts with two documents per row, each in arrays of its own.

B rows of a batch, T positions in a row.
"""

from collections.abc import Sequence

import numpy as np

from jaxgpt.data import packing as packings
from jaxgpt.data import source
from jaxgpt.data.layouts.language_model import predictions
from jaxgpt.data.layouts.layout import Batch, Item, ReadRow, place, read, zeros


class Preference:
  """A preference pair per row: {'chosen': …, 'rejected': …}, each with the arrays of `CausalLM`.

  Row i of both holds the two answers to one prompt. An answer that is too long loses its end. A
  pair is left out if its prompt leaves no room for one of the answers.
  """

  predicts_next = True
  predicts_tokens = False

  def index(
    self, split: source.Split, packing: str, seq_len: int
  ) -> tuple[packings.PackIndex, int]:
    """See `Layout`. Two consecutive documents fill one row, whatever `packing` says."""
    del packing
    # The target of prediction i is stored token i + 1.
    fits = np.all((split.first_trained() <= seq_len).reshape(-1, 2), axis=1)
    docs = np.flatnonzero(np.repeat(fits, 2))
    lengths = split.lengths[docs]
    pack = packings.PackIndex(
      seq_len,
      np.arange(0, len(docs) + 1, 2),
      docs,
      np.zeros(len(docs), np.int64),
      np.minimum(lengths, seq_len),
      left_out=len(split.lengths) - len(docs),
    )
    return pack, int((lengths > seq_len).sum())

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


class Retrieval:
  """A query and its positive per row: {'query': …, 'positive': …}, each with these arrays.

    tokens, segment_ids, positions: int32 [B, T]. segment_ids is 1, or 0 in padding.
    loss_weights: float32 [B]. 0 for a row of padding.

  Of a text that is too long, the end is cut off, but its eos is kept.
  """

  predicts_next = False
  predicts_tokens = False
  sides = ("query", "positive")

  def index(
    self, split: source.Split, packing: str, seq_len: int
  ) -> tuple[packings.PackIndex, int]:
    """See `Layout`. Two consecutive documents fill one row, whatever `packing` says."""
    del packing
    stored = split.lengths + 1
    is_cut = (stored > seq_len).astype(np.int64)
    # Each document has up to two spans: | text ... | its eos if cut |
    length = np.stack((np.minimum(stored, seq_len) - is_cut, is_cut), axis=1).reshape(-1)
    start = np.stack((0 * stored, stored - 1), axis=1).reshape(-1)
    doc, exists = np.repeat(np.arange(len(stored)), 2), length > 0
    offsets = np.concatenate(([0], np.cumsum(exists)[3::4]))
    pack = packings.PackIndex(seq_len, offsets, doc[exists], start[exists], length[exists])
    return pack, int(is_cut.sum())

  def batch(self, items: Sequence[Item], num_rows: int, seq_len: int) -> Batch:
    """See `Layout`."""
    out = {
      side: zeros(num_rows, seq_len, "tokens", "segment_ids", "positions")
      | {"loss_weights": np.zeros(num_rows, np.float32)}
      for side in self.sides
    }
    for i, (_, (docs, _, _), tokens) in enumerate(read(items, 0)):
      for number, side in enumerate(self.sides):
        of_side = [ids for doc, ids in zip(docs.tolist(), tokens) if doc == docs[0] + number]
        place(out[side], i, of_side, one=True)
        out[side]["loss_weights"][i] = 1
    return out
