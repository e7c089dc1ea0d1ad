"""Layouts of language modeling: packed next-token predictions, and packed masked tokens.

B rows of a batch, T positions in a row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgpt.data import packing as packings
from jaxgpt.data import source
from jaxgpt.data.layouts.layout import Batch, Item, ReadRow, Spans, each, place, read, zeros
from jaxgpt.data.masking import Masking


class CausalLM:
  """Packed next-token predictions.

  The arrays, all [B, T]:
    tokens, targets: int32. A token and its successor, or 0 in padding.
    loss_weights: float32. 1 if the prediction is trained on, 0 otherwise and in padding.
    segment_ids: int32. 1, 2, … for the spans of a row in order, 0 in padding.
    positions: int32. Counts from 0 in each span.
  """

  predicts_next = True
  predicts_tokens = True

  def index(
    self, split: source.Split, packing: str, seq_len: int
  ) -> tuple[packings.PackIndex, int]:
    """See `Layout`. Long documents continue in further rows, so none is cut off."""
    return packings.PACKINGS[packing](split.lengths, seq_len), 0

  def batch(self, items: Sequence[Item], num_rows: int, seq_len: int) -> Batch:
    """See `Layout`."""
    return predictions(read(items, 1), num_rows, seq_len)


def packed(rows: Sequence[Sequence[Any]], num_rows: int, seq_len: int) -> Batch:
  """Assembles the arrays of `CausalLM` for rows whose predictions are all trained on.

  Args:
    rows: For each row a list of spans. Each span is an int array with its tokens and one more,
      the target of the last.
    num_rows: Rows of the batch. Those after `rows` are padding.
    seq_len: T.
  """
  out = zeros(
    num_rows, seq_len, "tokens", "targets", "segment_ids", "positions", floats=("loss_weights",)
  )
  counts_T = np.arange(seq_len, dtype=np.int32)
  for i, spans in enumerate(rows):
    tokens_T, targets_T, weights_T, segment_ids_T, positions_T = (
      out[key][i] for key in ("tokens", "targets", "loss_weights", "segment_ids", "positions")
    )
    at = 0
    for segment, ids in enumerate(spans, 1):
      end = at + len(ids) - 1
      tokens_T[at:end] = ids[:-1]
      targets_T[at:end] = ids[1:]
      segment_ids_T[at:end] = segment
      positions_T[at:end] = counts_T[: end - at]
      at = end
    weights_T[:at] = 1
  return out


def predictions(rows: Sequence[ReadRow], num_rows: int, seq_len: int) -> Batch:
  """The arrays of `CausalLM` for rows that were read with one more token per span."""
  out = packed([row.tokens for row in rows], num_rows, seq_len)
  for i, (split, spans, _) in enumerate(rows):
    if split.kind != "text":
      out["loss_weights"][i] = 0
      _weigh(out["loss_weights"][i], split, spans)
  return out


def _weigh(weights_T: np.ndarray, split: source.Split, spans: Spans) -> None:
  """Sets the weights of a labelled row's trained predictions to 1."""
  at = 0
  for doc, start, length in each(spans):
    trained = split.trained(doc)
    for first, last in () if trained is None else trained.tolist():
      # Prediction i has stored token i + 1 as its target.
      low, high = max(first - 1 - start, 0), min(last - 1 - start, length)
      weights_T[at + low : at + max(low, high)] = 1
    at += length


class MaskedLM:
  """Packed tokens with some of them masked, in the same arrays as `CausalLM`.

  tokens are the model's input after masking, targets the original tokens, and loss_weights is 1 at
  the positions that were chosen for prediction.
  """

  predicts_next = False
  predicts_tokens = True

  def __init__(self, masking: Masking | None):
    """Args: masking: How to mask, or None if only blank batches are needed."""
    self._masking = masking

  def index(
    self, split: source.Split, packing: str, seq_len: int
  ) -> tuple[packings.PackIndex, int]:
    """See `Layout`. Spans count stored tokens, one more per document than predictions."""
    return packings.PACKINGS[packing](split.lengths + 1, seq_len), 0

  def batch(self, items: Sequence[Item], num_rows: int, seq_len: int) -> Batch:
    """See `Layout`."""
    out = zeros(
      num_rows, seq_len, "tokens", "targets", "segment_ids", "positions", floats=("loss_weights",)
    )
    for i, row in enumerate(read(items, 0)):
      place(out, i, row.tokens, "targets")
      assert self._masking is not None, "a layout without masking makes only blank batches"
      out["tokens"][i], out["loss_weights"][i] = self._masking(
        out["targets"][i], out["segment_ids"][i], items[i].position
      )
    return out
