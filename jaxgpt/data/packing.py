"""Documents' lengths to rows: an index, so that any row can be made on its own.

The unit is a prediction, a pair of an input and the token after it. A document of n + 1 stored
tokens has n of them. A row has room for `seq_len`, and holds spans (document, start, length) whose
inputs are stored[start : start + length] and whose targets are stored[start + 1 : start + length +
1]. In every packing here each prediction is in exactly one span.
"""

import dataclasses
import itertools

import numpy as np

_WINDOW = 1 << 16


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


def best_fit(lengths, seq_len, window=_WINDOW):
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
  doc, start, length = _pieces(lengths, seq_len)
  row = np.empty(len(doc), np.int64)
  num_rows = 0
  for low in range(0, len(doc), window):
    part = slice(low, low + window)
    local, count = _best_fit_decreasing(length[part], seq_len)
    row[part] = local + num_rows
    num_rows += count
  # Rename the rows by their first pieces; pieces are already in the documents' order.
  first = np.full(num_rows, len(doc), np.int64)
  np.minimum.at(first, row, np.arange(len(doc)))
  rank = np.empty(num_rows, np.int64)
  rank[np.argsort(first)] = np.arange(num_rows)
  row = rank[row]
  order = np.argsort(row, kind="stable")
  return _index(seq_len, row[order], doc[order], start[order], length[order])


def _best_fit_decreasing(sizes, capacity):
  """Rows for items of 1..capacity: (row of each item, number of rows).

  Items of one size are placed together: best fit fills the fullest row that holds such an item for
  as long as it does, so a group of equally full rows takes its items in one step. That makes the
  work grow with the number of different sizes and not with the items.
  """
  order = np.argsort(-sizes, kind="stable")
  ordered = sizes[order]
  row_of = np.empty(len(sizes), np.int64)
  rows_with = [[] for _ in range(capacity + 1)]  # by room left
  has_rows = 0  # bit r is set where rows_with[r] has rows
  num_rows = 0
  cuts = [0, *(np.nonzero(np.diff(ordered))[0] + 1).tolist(), len(ordered)]
  for low, high in itertools.pairwise(cuts):
    size = int(ordered[low])
    while low < high:
      fitting = has_rows >> size
      if fitting:
        room = size + (fitting & -fitting).bit_length() - 1
        rows = rows_with[room]
      else:
        room = capacity
        new = -(-(high - low) // (room // size))
        rows = rows_with[room]
        rows.extend(range(num_rows, num_rows + new))
        num_rows += new
      per_row = room // size
      use = min(len(rows), -(-(high - low) // per_row))
      taken, rows_with[room] = rows[:use], rows[use:]
      placed = min(high - low, use * per_row)
      row_of[order[low : low + placed]] = np.repeat(taken, per_row)[:placed]
      low += placed
      last = placed - (use - 1) * per_row  # items in the last row taken
      rows_with[room - per_row * size].extend(taken[:-1])
      rows_with[room - last * size].append(taken[-1])
      for changed in (room, room - per_row * size, room - last * size):
        has_rows = has_rows | 1 << changed if rows_with[changed] else has_rows & ~(1 << changed)
      has_rows &= ~1  # full rows hold nothing
  return row_of, num_rows


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
  doc, start, length = _pieces(lengths, seq_len)
  return _index(seq_len, np.arange(len(doc)), doc, start, length)


def _pieces(lengths, seq_len):
  """(doc, start, length) of all documents cut every `seq_len`, in their order."""
  lengths = np.asarray(lengths, np.int64)
  counts = -(-lengths // seq_len)
  doc = np.repeat(np.arange(len(lengths)), counts)
  start = (np.arange(len(doc)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
  return doc, start, np.minimum(lengths[doc] - start, seq_len)


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
