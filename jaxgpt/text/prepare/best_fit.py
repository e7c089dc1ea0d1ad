"""Best-fit decreasing: puts pieces of documents into as few rows of one length as it can.

Ding et al. 2024, arXiv:2404.10830. `jaxgpt.data.packing` makes training rows with it, and the data
card reports how full they are. Names of arrays: D documents, P pieces.
"""

import itertools

import numpy as np

WINDOW = 1 << 16  # pieces that are packed together


def cut(lengths: np.ndarray, row_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Cuts documents every `row_len` predictions from their start.

  Args:
    lengths: [D] predictions of each document.
    row_len: Predictions that a row has room for.

  Returns:
    (doc, start, length), each [P], in the order of the documents: a piece's document, the number
    of its first prediction there, and its predictions.
  """
  lengths = np.asarray(lengths, np.int64)
  counts = -(-lengths // row_len)
  doc = np.repeat(np.arange(len(lengths)), counts)
  start = (np.arange(len(doc)) - np.repeat(np.cumsum(counts) - counts, counts)) * row_len
  return doc, start, np.minimum(lengths[doc] - start, row_len)


def pack(sizes: np.ndarray, capacity: int, window: int = WINDOW) -> tuple[np.ndarray, int]:
  """Assigns each piece to a row.

  Args:
    sizes: [P] integers in 1..capacity.
    capacity: Room of a row.
    window: Pieces that are packed together. It bounds the distance of pieces that share a row.

  Returns:
    ([P] number of each piece's row, number of rows).
  """
  row = np.empty(len(sizes), np.int64)
  num_rows = 0
  for low in range(0, len(sizes), window):
    here = slice(low, low + window)
    local, count = _pack_window(sizes[here], capacity)
    row[here] = local + num_rows
    num_rows += count
  return row, num_rows


def _pack_window(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
  """Best-fit decreasing within a window: (row of each piece, number of rows).

  Pieces are placed from the longest to the shortest, each into the fullest row with enough room.
  Pieces of equal size are placed together: a row that is the best fit for one of them stays the
  best fit for the next until it is full, and rows with equal room are equally good. So one step
  fills a whole group of rows, and the work grows with the number of different sizes, not of pieces.

      rows_with[room]   3: [7, 9]   5: [2]   8: [4, 6]      numbers of the rows with this room
      has_rows          bits 3, 5 and 8 are set
      piece of size 4   has_rows >> 4 has its lowest bit at 1: room 4 + 1 = 5 fits best, row 2
      afterwards        row 2 has room 1 and moves to rows_with[1]
  """
  order = np.argsort(-sizes, kind="stable")
  ordered = sizes[order]
  row_of = np.empty(len(sizes), np.int64)
  rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
  has_rows = 0
  num_rows = 0
  cuts = [0, *(np.nonzero(np.diff(ordered))[0] + 1).tolist(), len(ordered)]
  for low, high in itertools.pairwise(cuts):
    size = int(ordered[low])
    while low < high:
      fitting = has_rows >> size
      if fitting:
        room = size + (fitting & -fitting).bit_length() - 1
        rows = rows_with[room]
      else:  # open as many rows as the rest of this size needs
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
      last = placed - (use - 1) * per_row  # pieces in the last row taken
      rows_with[room - per_row * size].extend(taken[:-1])
      rows_with[room - last * size].append(taken[-1])
      for changed in (room, room - per_row * size, room - last * size):
        has_rows = has_rows | 1 << changed if rows_with[changed] else has_rows & ~(1 << changed)
      has_rows &= ~1  # full rows take nothing more
  return row_of, num_rows
