"""Documents' lengths to rows: an index, so that any row can be made on its own.

The unit is a prediction, a pair of an input and the token after it. A document of n + 1 stored
tokens has n of them. A row has room for `seq_len`, and holds spans (document, start, length) whose
inputs are stored[start : start + length] and whose targets are stored[start + 1 : start + length +
1]. In every packing here each prediction is in exactly one span.
"""

import dataclasses

import numpy as np

from jaxgpt.text.prepare import best_fit as best_fit_lib


@dataclasses.dataclass(frozen=True)
class PackIndex:
  """Rows of spans.

  Attributes:
    seq_len: predictions a row has room for.
    row_offsets: int64 [R + 1]; the spans of row r are row_offsets[r] : row_offsets[r + 1].
    doc, start, length: [S] integers, a span's document, first prediction and predictions.
  """

  seq_len: int
  row_offsets: np.ndarray
  doc: np.ndarray
  start: np.ndarray
  length: np.ndarray

  def __len__(self):
    return self.num_rows

  @property
  def num_rows(self):
    return len(self.row_offsets) - 1

  @property
  def padding_share(self):
    """Share of all places that no prediction fills, in [0, 1]."""
    places = self.num_rows * self.seq_len
    return 1 - int(self.length.sum(dtype=np.int64)) / places if places else 0.0

  def spans(self, row):
    """(doc, start, length) arrays of one row's spans, in their order in the row."""
    s = slice(self.row_offsets[row], self.row_offsets[row + 1])
    return self.doc[s], self.start[s], self.length[s]


def best_fit(lengths, seq_len, window=best_fit_lib.WINDOW):
  """Keeps documents together: best-fit decreasing (Ding et al. 2024, arXiv:2404.10830).

  A document longer than a row is cut every `seq_len` predictions from its start: the whole pieces
  are rows of their own and only the rest shares one, so that no document is cut more often than
  it must be. Rests and short documents are placed longest first, each into the fullest row that
  still holds it. Nothing is thrown away. Rows are in the order of the first span in them, and so
  are the spans of a row: reading goes forward through the files, and consecutive rows of a long
  document are consecutive pieces of it.

  Args:
    lengths: [documents] predictions of each; those of 0 are in no row.
    seq_len: predictions a row has room for.
    window: pieces that are packed together; bounds the distance of documents that share a row.

  Returns:
    A PackIndex.
  """
  doc, start, length = best_fit_lib.cut(lengths, seq_len)
  row, num_rows = best_fit_lib.pack(length, seq_len, window)
  # Rename the rows by their first pieces; pieces are already in the documents' order.
  first = np.full(num_rows, len(doc), np.int64)
  np.minimum.at(first, row, np.arange(len(doc)))
  rank = np.empty(num_rows, np.int64)
  rank[np.argsort(first)] = np.arange(num_rows)
  row = rank[row]
  order = np.argsort(row, kind="stable")
  return _index(seq_len, row[order], doc[order], start[order], length[order])


def concat(lengths, seq_len):
  """One stream of all documents, cut every `seq_len` predictions; only the last row is padded.

  Documents stay apart as spans, but are cut wherever a row ends.

  Args and returns: as `best_fit`.
  """
  lengths = np.asarray(lengths, np.int64)
  begins = np.cumsum(lengths) - lengths
  total = int(lengths.sum())
  # Two sorted runs, which a stable sort merges in one pass.
  cut = np.sort(np.concatenate((begins[lengths > 0], np.arange(0, total, seq_len))), kind="stable")
  cut = cut[np.diff(cut, prepend=-1) > 0]
  doc = np.searchsorted(begins, cut, side="right") - 1
  # Documents without predictions begin where the next one does: the last to begin there has some.
  return _index(seq_len, cut // seq_len, doc, cut - begins[doc], np.diff(cut, append=total))


def one_per_row(lengths, seq_len):
  """A document, or a piece of `seq_len` predictions of it, in each row.

  Args and returns: as `best_fit`.
  """
  doc, start, length = best_fit_lib.cut(lengths, seq_len)
  return _index(seq_len, np.arange(len(doc)), doc, start, length)


def _index(seq_len, row, doc, start, length):
  """The PackIndex of spans that are sorted by row; each row has at least one."""
  num_rows = int(row[-1]) + 1 if len(row) else 0
  return PackIndex(
    seq_len,
    np.searchsorted(row, np.arange(num_rows + 1)).astype(np.int64),
    _compact(doc),
    _compact(start),
    _compact(length),
  )


def _compact(x):
  return x.astype(np.int32 if not len(x) or x.max() < 1 << 31 else np.int64)


PACKINGS = {"best_fit": best_fit, "concat": concat, "one_per_row": one_per_row}
