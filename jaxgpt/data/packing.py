"""Packing: assigns documents to rows of fixed length, as an index from which any row can be made.

The unit is a prediction: an input token and its successor, the target. A document of n + 1 stored
tokens has n predictions. A row has room for `seq_len` predictions and holds spans (document, start,
length). The inputs of a span are stored[start : start + length], its targets
stored[start + 1 : start + length + 1]. Every packing puts each prediction in exactly one span.

With seq_len 8 and documents A to D of 11, 5, 3 and 4 predictions (. is padding):

  best_fit       AAAAAAAA  AAABBBBB  CCCDDDD.             long ones cut, the rest kept whole
  concat         AAAAAAAA  AAABBBBB  CCCDDDD.             one stream, cut wherever a row ends
  one_per_row    AAAAAAAA  AAA.....  BBBBB...  CCC.....  DDDD....
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from jaxgpt.text.prepare import best_fit as best_fit_lib


@dataclasses.dataclass(frozen=True)
class PackIndex:
  """The spans of all rows.

  Attributes:
    seq_len: Predictions that a row has room for.
    row_offsets: int64 [R + 1]. Row r has the spans row_offsets[r] : row_offsets[r + 1].
    doc: [S] integers, the document of each span.
    start: [S] integers, its first prediction.
    length: [S] integers, its number of predictions.
    left_out: Documents that are in no row, since nothing that is learned of them fits into one.
  """

  seq_len: int
  row_offsets: np.ndarray
  doc: np.ndarray
  start: np.ndarray
  length: np.ndarray
  left_out: int = 0

  def __len__(self) -> int:
    return self.num_rows

  @property
  def num_rows(self) -> int:
    """Number of rows (R)."""
    return len(self.row_offsets) - 1

  @property
  def padding_share(self) -> float:
    """Share of padding among all positions, in [0, 1]."""
    places = self.num_rows * self.seq_len
    return 1 - int(self.length.sum(dtype=np.int64)) / places if places else 0.0

  def spans(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(doc, start, length) arrays of a row's spans, in order."""
    s = slice(self.row_offsets[row], self.row_offsets[row + 1])
    return self.doc[s], self.start[s], self.length[s]


def best_fit(lengths: ArrayLike, seq_len: int, window: int = best_fit_lib.WINDOW) -> PackIndex:
  """Packs whole documents: best-fit decreasing (Ding et al. 2024, arXiv:2404.10830).

  A document longer than a row is cut every `seq_len` predictions from its start. The full pieces
  fill rows of their own and only the rest shares a row, so that no document is cut more often than
  necessary. Rests and short documents are placed longest first, each into the fullest row that has
  room for it. Nothing is dropped.

  Rows are ordered by their first span, and spans within a row likewise. So reading moves forward
  through the files, and consecutive rows of a long document are consecutive pieces of it.

  Args:
    lengths: [documents], the predictions of each. Documents without predictions are in no row.
    seq_len: Predictions that a row has room for.
    window: Pieces that are packed together, which bounds the distance of documents in a row.
  """
  doc, start, length = best_fit_lib.cut(np.asarray(lengths, np.int64), seq_len)
  row, num_rows = best_fit_lib.pack(length, seq_len, window)
  # Renumber the rows by their first pieces; pieces are already in document order.
  first = np.full(num_rows, len(doc), np.int64)
  np.minimum.at(first, row, np.arange(len(doc)))
  rank = np.empty(num_rows, np.int64)
  rank[np.argsort(first)] = np.arange(num_rows)
  row = rank[row]
  order = np.argsort(row, kind="stable")
  return _index(seq_len, row[order], doc[order], start[order], length[order])


def concat(lengths: ArrayLike, seq_len: int) -> PackIndex:
  """Concatenates all documents and cuts them every `seq_len` predictions. Pads only the last row.

  Documents remain separate spans, but are cut wherever a row ends.

  Args:
    lengths: See `best_fit`.
    seq_len: See `best_fit`.
  """
  lengths = np.asarray(lengths, np.int64)
  begins = np.cumsum(lengths) - lengths
  total = int(lengths.sum())
  # Cuts are the beginnings of documents and of rows: two sorted runs, which a stable sort merges.
  cut = np.sort(np.concatenate((begins[lengths > 0], np.arange(0, total, seq_len))), kind="stable")
  cut = cut[np.diff(cut, prepend=-1) > 0]
  doc = np.searchsorted(begins, cut, side="right") - 1
  # A document without predictions begins where the next one does. The last one to begin there is
  # the one with predictions.
  return _index(seq_len, cut // seq_len, doc, cut - begins[doc], np.diff(cut, append=total))


def one_per_row(lengths: ArrayLike, seq_len: int) -> PackIndex:
  """Puts one document, or one piece of `seq_len` predictions of it, in each row.

  Args:
    lengths: See `best_fit`.
    seq_len: See `best_fit`.
  """
  doc, start, length = best_fit_lib.cut(np.asarray(lengths, np.int64), seq_len)
  return _index(seq_len, np.arange(len(doc)), doc, start, length)


def _index(
  seq_len: int, row: np.ndarray, doc: np.ndarray, start: np.ndarray, length: np.ndarray
) -> PackIndex:
  """The PackIndex of spans that are sorted by row. Each row has at least one span."""
  num_rows = int(row[-1]) + 1 if len(row) else 0
  return PackIndex(
    seq_len,
    np.searchsorted(row, np.arange(num_rows + 1)).astype(np.int64),
    _compact(doc),
    _compact(start),
    _compact(length),
  )


def _compact(x: np.ndarray) -> np.ndarray:
  """Stores as int32 if the values fit."""
  return x.astype(np.int32 if not len(x) or x.max() < 1 << 31 else np.int64)


PACKINGS: dict[str, Callable[[ArrayLike, int], PackIndex]] = {
  "best_fit": best_fit,
  "concat": concat,
  "one_per_row": one_per_row,
}
