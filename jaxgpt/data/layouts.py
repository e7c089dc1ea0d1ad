"""How the rows of an objective are laid out: what each holds, and the arrays it becomes.

A layout has `kinds` (of data that it takes), `index` (a split to the spans of its rows) and
`batch` (some rows to arrays). Suffixes: B rows of a batch, T places in a row.
"""

from typing import NamedTuple

import numpy as np

from jaxgpt.data import packing as packings
from jaxgpt.data import source
from jaxgpt.errors import UserError


class Item(NamedTuple):
  """A row to make."""

  split: source.Split
  pack: packings.PackIndex
  row: int
  position: int  # what random draws depend on


class CausalLM:
  """Packed predictions: tokens, targets, loss_weights, segment_ids, positions, all [B, T].

  tokens, targets: int32, a token and the one after it; 0 in padding. loss_weights: float32, 1 for
  a prediction that is learned and 0 for others and padding. segment_ids: int32, 1, 2, … for the
  spans of a row in their order; 0 for padding. positions: int32, from 0 in each span.
  """

  kinds = ("text", "seq2seq", "chat")

  def index(self, split, packing, seq_len):
    """The PackIndex of a split, and how many documents lost an end that no row holds."""
    return packings.PACKINGS[packing](split.lengths, seq_len), 0

  def batch(self, items, num_rows, seq_len):
    """The batch of some rows, filled up to `num_rows` with padding."""
    return _predictions(_read(items, 1), num_rows, seq_len)


def packed(rows, num_rows, seq_len):
  """The arrays of `CausalLM` for rows of which all predictions are learned.

  Args:
    rows: for each a list of int arrays: the tokens of a span and the one after it.
    num_rows: of the arrays; those without pieces are padding.
    seq_len: T.
  """
  out = _zeros(
    num_rows, seq_len, "tokens", "targets", "segment_ids", "positions", floats=("loss_weights",)
  )
  places = np.arange(seq_len, dtype=np.int32)
  for i, pieces in enumerate(rows):
    tokens_T, targets_T, weights_T, segment_ids_T, positions_T = (
      out[key][i] for key in ("tokens", "targets", "loss_weights", "segment_ids", "positions")
    )
    at = 0
    for segment, ids in enumerate(pieces, 1):
      end = at + len(ids) - 1
      tokens_T[at:end] = ids[:-1]
      targets_T[at:end] = ids[1:]
      segment_ids_T[at:end] = segment
      positions_T[at:end] = places[: end - at]
      at = end
    weights_T[:at] = 1
  return out


def _predictions(rows, num_rows, seq_len):
  """The arrays of `CausalLM` for rows of `_read`, each with one token more a span."""
  out = packed([pieces for _, _, pieces in rows], num_rows, seq_len)
  for i, (split, spans, _) in enumerate(rows):
    if split.kind != "text":
      out["loss_weights"][i] = 0
      _weigh(out["loss_weights"][i], split, spans)
  return out


def _weigh(weights_T, split, spans):
  """Sets the weights of the predictions of a row that are learned to 1."""
  at = 0
  for doc, start, length in zip(*(a.tolist() for a in spans)):
    for first, last in split.trained(doc).tolist():
      # The prediction of stored token s is number s - 1.
      low, high = max(first - 1 - start, 0), min(last - 1 - start, length)
      weights_T[at + low : at + max(low, high)] = 1
    at += length


class MaskedLM:
  """Packed tokens, of which some are masked: the arrays of `CausalLM`.

  tokens: as the model sees them. targets: as they were. loss_weights: 1 where one was chosen.
  """

  kinds = ("text",)

  def __init__(self, masking):
    """Args: masking: from `masking.make`."""
    self._masking = masking

  def index(self, split, packing, seq_len):
    """As `CausalLM.index`, but spans are of stored tokens."""
    return packings.PACKINGS[packing](split.lengths + 1, seq_len), 0

  def batch(self, items, num_rows, seq_len):
    """As `CausalLM.batch`."""
    out = _zeros(
      num_rows, seq_len, "tokens", "targets", "segment_ids", "positions", floats=("loss_weights",)
    )
    places = np.arange(seq_len, dtype=np.int32)
    for i, (_, _, pieces) in enumerate(_read(items, 0)):
      at = 0
      for segment, ids in enumerate(pieces, 1):
        here = slice(at, at + len(ids))
        out["targets"][i, here] = ids
        out["segment_ids"][i, here] = segment
        out["positions"][i, here] = places[: len(ids)]
        at += len(ids)
      out["tokens"][i], out["loss_weights"][i] = self._masking(
        out["targets"][i], out["segment_ids"][i], items[i].position
      )
    return out


class Classification:
  """An example a row: tokens, segment_ids, positions, token_types [B, T], labels and weights [B].

  segment_ids are 1, or 0 in padding; token_types 1 in the second text of a pair; labels int32
  classes, or float32 where they have no names; loss_weights float32, 0 for a row of padding. Of
  what is too long the end of the longer text is cut, and its eos kept.
  """

  kinds = ("classification",)

  def __init__(self, has_classes):
    """Args: has_classes: whether labels are classes and no values."""
    self._has_classes = has_classes

  def index(self, split, packing, seq_len):
    """A row for each document; `packing` does not matter. See `CausalLM.index`."""
    del packing
    stored = split.lengths + 1
    seconds = split.second.astype(np.int64)
    firsts = np.where(seconds > 0, seconds, stored)
    rests = stored - firsts
    kept_second = np.minimum(rests, np.maximum(seq_len - firsts, seq_len // 2))
    kept_first = np.minimum(firsts, seq_len - kept_second)
    spans = []  # (start, length) of each of up to four spans; a length of 0 is none
    for start, size, kept in ((0 * firsts, firsts, kept_first), (firsts, rests, kept_second)):
      is_cut = kept < size
      spans.append((start, np.maximum(kept - is_cut, 0)))
      spans.append((start + size - 1, (is_cut & (kept > 0)).astype(np.int64)))
    start, length = (np.stack(a, axis=1).reshape(-1) for a in zip(*spans))
    doc = np.repeat(np.arange(len(stored)), 4)
    there = length > 0
    offsets = np.concatenate(([0], np.cumsum(there)[3::4]))
    pack = packings.PackIndex(seq_len, offsets, doc[there], start[there], length[there])
    return pack, int((kept_first + kept_second < stored).sum())

  def batch(self, items, num_rows, seq_len):
    """As `CausalLM.batch`."""
    out = _zeros(num_rows, seq_len, "tokens", "segment_ids", "positions", "token_types")
    out["labels"] = np.zeros(num_rows, np.int32 if self._has_classes else np.float32)
    out["loss_weights"] = np.zeros(num_rows, np.float32)
    for i, (split, (docs, starts, lengths), pieces) in enumerate(_read(items, 0)):
      at = int(lengths.sum())
      second = int(split.second[docs[0]])
      out["tokens"][i, :at] = np.concatenate(pieces)
      out["segment_ids"][i, :at] = 1
      out["positions"][i, :at] = np.arange(at)
      if second:
        out["token_types"][i, :at] = np.repeat(starts >= second, lengths)
      out["labels"][i] = split.labels[docs[0]]
      out["loss_weights"][i] = 1
    return out


class Preference:
  """A pair a row: {'chosen': …, 'rejected': …}, each with the arrays of `CausalLM`.

  The two answers to a prompt are in the same row. What is too long loses its end.
  """

  kinds = ("preference",)

  def index(self, split, packing, seq_len):
    """A row for each two documents; `packing` does not matter. See `CausalLM.index`."""
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

  def batch(self, items, num_rows, seq_len):
    """As `CausalLM.batch`."""
    rows = _read(items, 1)
    return {
      name: _predictions(
        [
          (split, [a[side : side + 1] for a in spans], pieces[side : side + 1])
          for split, spans, pieces in rows
        ],
        num_rows,
        seq_len,
      )
      for side, name in enumerate(("chosen", "rejected"))
    }


def _zeros(num_rows, seq_len, *names, floats=()):
  return {
    name: np.zeros((num_rows, seq_len), np.float32 if name in floats else np.int32)
    for name in (*names, *floats)
  }


def _read(items, more):
  """[(split, spans, stored tokens of each span and `more` after it)], one read a split."""
  out = [None] * len(items)
  groups = {}
  for i, item in enumerate(items):
    groups.setdefault(id(item.split), []).append(i)
  for numbers in groups.values():
    split = items[numbers[0]].split
    spans = [items[i].pack.spans(items[i].row) for i in numbers]
    doc, start, length = (np.concatenate(a) for a in zip(*spans))
    stored = iter(split.read_many(doc, start, length.astype(np.int64) + more))
    for i, of_row in zip(numbers, spans):
      out[i] = split, of_row, [next(stored) for _ in of_row[0]]
  return out


OBJECTIVES = {
  "causal_lm": CausalLM,
  "masked_lm": MaskedLM,
  "classification": Classification,
  "preference": Preference,
}
_OF_KIND = {
  "text": "causal_lm or masked_lm",
  "seq2seq": "causal_lm",
  "chat": "causal_lm",
  "classification": "classification",
  "preference": "preference",
}


def first_objective(kind):
  """The objective that data of a kind is mostly used for."""
  return _OF_KIND[kind].split()[0]


def make(objective, splits, masking=None):
  """The layout of an objective.

  Args:
    objective: a key of `OBJECTIVES`.
    splits: [(name, `source.Split`)] of what is to be laid out.
    masking: masked_lm: from `masking.make`.

  Raises:
    UserError: a split's kind of data is not what the objective takes, or they have other classes.
  """
  layout = OBJECTIVES[objective]
  name, first = splits[0]
  for other, split in splits:
    if split.kind not in layout.kinds:
      raise UserError(
        f"objective.name={objective!r} takes data of kind {' or '.join(layout.kinds)}, and "
        f"{other!r} is of kind {split.kind}: set objective.name to {_OF_KIND[split.kind]}, or "
        f"prepare it with --kind={layout.kinds[0]}"
      )
    if split.label_names != first.label_names:
      raise UserError(
        f"{other!r} and {name!r} have other classes: {', '.join(split.label_names)} "
        f"and {', '.join(first.label_names)}; prepare them together"
      )
  if layout is MaskedLM:
    return MaskedLM(masking)
  return Classification(bool(first.label_names)) if layout is Classification else layout()
