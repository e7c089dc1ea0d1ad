"""Layouts with one labelled text, or pair of texts, per row.

B rows of a batch, T positions in a row.
"""

from collections.abc import Sequence

import numpy as np

from jaxgpt.data import packing as packings
from jaxgpt.data import source
from jaxgpt.data.layouts.layout import Batch, Item, place, read, zeros


class Classification:
  """One labelled example per row.

  The arrays:
    tokens, segment_ids, positions: int32 [B, T]. segment_ids is 1, or 0 in padding.
    token_types: int32 [B, T]. 1 in the second text of a pair.
    labels: [B]. int32 classes, or float32 values for a regression.
    loss_weights: float32 [B]. 0 for a row of padding.

  Of an example that is too long, the end of the longer text is cut off, but its eos is kept.
  """

  predicts_next = False
  predicts_tokens = False

  def __init__(self, has_classes: bool):
    """Args: has_classes: Labels are classes, not numbers."""
    self._has_classes = has_classes

  def index(
    self, split: source.Split, packing: str, seq_len: int
  ) -> tuple[packings.PackIndex, int]:
    """See `Layout`. A document fills one row, whatever `packing` says."""
    del packing
    # A row has up to four spans, each of them possibly empty:
    #
    #   | first text ... | its eos if cut | second text ... | its eos if cut |
    #
    # The second text may keep half of the row, or more if the first leaves it room.
    stored = split.lengths + 1
    seconds = split.second.astype(np.int64)
    firsts = np.where(seconds > 0, seconds, stored)
    rests = stored - firsts
    kept_second = np.minimum(rests, np.maximum(seq_len - firsts, seq_len // 2))
    kept_first = np.minimum(firsts, seq_len - kept_second)
    spans = []  # (start, length) arrays of each of the four
    for start, size, kept in ((0 * firsts, firsts, kept_first), (firsts, rests, kept_second)):
      is_cut = kept < size
      spans.append((start, np.maximum(kept - is_cut, 0)))
      spans.append((start + size - 1, (is_cut & (kept > 0)).astype(np.int64)))
    start, length = (np.stack(a, axis=1).reshape(-1) for a in zip(*spans))
    doc = np.repeat(np.arange(len(stored)), 4)
    exists = length > 0
    offsets = np.concatenate(([0], np.cumsum(exists)[3::4]))
    pack = packings.PackIndex(seq_len, offsets, doc[exists], start[exists], length[exists])
    return pack, int((kept_first + kept_second < stored).sum())

  def batch(self, items: Sequence[Item], num_rows: int, seq_len: int) -> Batch:
    """See `Layout`."""
    out = zeros(num_rows, seq_len, "tokens", "segment_ids", "positions", "token_types")
    out["labels"] = self._no_labels(num_rows)
    out["loss_weights"] = np.zeros(num_rows, np.float32)
    for i, (split, (docs, starts, lengths), tokens) in enumerate(read(items, 0)):
      second = int(split.second[docs[0]])
      place(out, i, tokens, one=True)
      if second:
        out["token_types"][i, : lengths.sum()] = np.repeat(starts >= second, lengths)
      self._label(out["labels"], i, split, docs[0])
      out["loss_weights"][i] = 1
    return out

  def _no_labels(self, num_rows: int) -> np.ndarray:
    """The labels of rows of padding."""
    return np.zeros(num_rows, np.int32 if self._has_classes else np.float32)

  def _label(self, labels: np.ndarray, row: int, split: source.Split, doc: int) -> None:
    """Writes the labels of a row's document."""
    labels[row] = split.labels[doc]


class MultiLabel(Classification):
  """As `Classification`, with any number of classes per example.

  labels is float32 [B, C]: 1 for the classes that an example has. C is `model.num_labels`.
  """

  def __init__(self, num_labels: int):
    """Args: num_labels: C."""
    super().__init__(has_classes=True)
    self._num_labels = num_labels

  def _no_labels(self, num_rows: int) -> np.ndarray:
    return np.zeros((num_rows, self._num_labels), np.float32)

  def _label(self, labels: np.ndarray, row: int, split: source.Split, doc: int) -> None:
    labels[row, split.classes(doc)] = 1
