"""Strided windows: rows for evaluation in which each prediction is scored once, with much context.

Training cuts a document longer than a row into pieces, and the first predictions of each piece have
little context. Here windows of T predictions overlap, and each scores only what the one before did
not. With T = 8, stride 4 and a document of 18 predictions (digits are scored, dots are context):

    01234567
        ....8901
            ....2345
              ......67

A prediction after the first T thus has between T - stride and T - 1 predictions of context.
"""

from collections.abc import Sequence

import numpy as np

from jaxgpt.data import packing as packings
from jaxgpt.data import source
from jaxgpt.data.layouts.language_model import CausalLM
from jaxgpt.data.layouts.layout import Batch, Item


def windows(
  lengths: np.ndarray, seq_len: int, stride: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """The windows of documents.

  Args:
    lengths: Predictions of each document.
    seq_len: Longest window (T).
    stride: Most predictions that a window after a document's first scores.

  Returns:
    (document, first prediction, length, first prediction that is scored) of each window, in order.
    Documents without predictions have none.
  """
  lengths = np.asarray(lengths, np.int64)
  counts = np.where(lengths > 0, 1 + -(-np.maximum(lengths - seq_len, 0) // stride), 0)
  doc = np.repeat(np.arange(len(lengths)), counts)
  number = np.arange(len(doc)) - np.repeat(np.cumsum(counts) - counts, counts)
  end = np.minimum(seq_len + number * stride, lengths[doc])
  start = np.maximum(end - seq_len, 0)
  first = np.where(number > 0, seq_len + (number - 1) * stride, 0)
  return doc, start, end - start, first


class StridedLM(CausalLM):
  """`CausalLM` with rows of `windows`. Only a window's last predictions have a weight."""

  def __init__(self, stride: int):
    """Args: stride: See `windows`."""
    self._stride = stride

  def index(
    self, split: source.Split, packing: str, seq_len: int
  ) -> tuple[packings.PackIndex, int]:
    """See `Layout`. Windows share rows as whole documents do, whatever `packing` says."""
    del packing
    doc, start, length, _ = windows(split.lengths, seq_len, self._stride)
    of_windows = packings.best_fit(length, seq_len)
    number = of_windows.doc
    return packings.PackIndex(
      seq_len, of_windows.row_offsets, doc[number], start[number], length[number]
    ), 0

  def batch(self, items: Sequence[Item], num_rows: int, seq_len: int) -> Batch:
    """See `Layout`."""
    out = super().batch(items, num_rows, seq_len)
    for i, item in enumerate(items):
      at = 0
      for start, length in zip(*(a.tolist() for a in item.pack.spans(item.row)[1:])):
        # A window that begins at 0 is a document's first, or a later one of a document that is
        # not longer than a row, of which there is none.
        if start > 0:
          seen = self._scored_before(start, length, seq_len) - start
          out["loss_weights"][i, at : at + seen] = 0
        at += length
    return out

  def _scored_before(self, start: int, length: int, seq_len: int) -> int:
    """The first prediction that a later window of a document scores."""
    end = start + length
    return seq_len + (-(-(end - seq_len) // self._stride) - 1) * self._stride
