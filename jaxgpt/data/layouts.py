"""Row layouts: which arrays a row of a batch becomes, and which documents share a row.

An objective names the layout that it reads (`Objective.layout`). Each layout is one entry of
`LAYOUTS`. Suffixes of array names: B rows of a batch, T positions in a row.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from jaxgpt.config.registry import Registry
from jaxgpt.data import packing as packings
from jaxgpt.data import source
from jaxgpt.data.masking import Masking
from jaxgpt.errors import UserError

Batch: TypeAlias = dict[str, Any]  # name -> np.ndarray, or a dict of these
Spans: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]  # (doc, start, length) of each span


class Item(NamedTuple):
  """A row to assemble."""

  split: source.Split
  pack: packings.PackIndex
  row: int  # index of the row in `pack`
  position: int  # global index of the row, which seeds random draws such as masking


class ReadRow(NamedTuple):
  """A row with its tokens."""

  split: source.Split
  spans: Spans
  tokens: list[np.ndarray]  # stored tokens of each span


class Layout(Protocol):
  """Turns a split into rows, and rows into the arrays of a batch.

  Attributes:
    predicts_next: `targets` holds the token after each of `tokens`. False if it holds the same
      token (masked LM), or if the layout has no targets (classification).
    predicts_tokens: The loss is a cross entropy per token. False if it is one per row.
  """

  predicts_next: bool
  predicts_tokens: bool

  def index(
    self, split: source.Split, packing: str, seq_len: int
  ) -> tuple[packings.PackIndex, int]:
    """Returns the spans of each row, and the number of documents whose end was cut off."""
    ...

  def batch(self, items: Sequence[Item], num_rows: int, seq_len: int) -> Batch:
    """Assembles a batch of `num_rows` rows. Rows after the last item are padding."""
    ...


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
    return _predictions(_read(items, 1), num_rows, seq_len)


def packed(rows: Sequence[Sequence[Any]], num_rows: int, seq_len: int) -> Batch:
  """Assembles the arrays of `CausalLM` for rows whose predictions are all trained on.

  Args:
    rows: For each row a list of spans. Each span is an int array with its tokens and one more,
      the target of the last.
    num_rows: Rows of the batch. Those after `rows` are padding.
    seq_len: T.
  """
  out = _zeros(
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


def _predictions(rows: Sequence[ReadRow], num_rows: int, seq_len: int) -> Batch:
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
  for doc, start, length in _each(spans):
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
    out = _zeros(
      num_rows, seq_len, "tokens", "targets", "segment_ids", "positions", floats=("loss_weights",)
    )
    counts_T = np.arange(seq_len, dtype=np.int32)
    for i, row in enumerate(_read(items, 0)):
      at = 0
      for segment, ids in enumerate(row.tokens, 1):
        here = slice(at, at + len(ids))
        out["targets"][i, here] = ids
        out["segment_ids"][i, here] = segment
        out["positions"][i, here] = counts_T[: len(ids)]
        at += len(ids)
      assert self._masking is not None, "a layout without masking makes only blank batches"
      out["tokens"][i], out["loss_weights"][i] = self._masking(
        out["targets"][i], out["segment_ids"][i], items[i].position
      )
    return out


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
    out = _zeros(num_rows, seq_len, "tokens", "segment_ids", "positions", "token_types")
    out["labels"] = np.zeros(num_rows, np.int32 if self._has_classes else np.float32)
    out["loss_weights"] = np.zeros(num_rows, np.float32)
    for i, (split, (docs, starts, lengths), tokens) in enumerate(_read(items, 0)):
      at = int(lengths.sum())
      second = int(split.second[docs[0]])
      out["tokens"][i, :at] = np.concatenate(tokens)
      out["segment_ids"][i, :at] = 1
      out["positions"][i, :at] = np.arange(at)
      if second:
        out["token_types"][i, :at] = np.repeat(starts >= second, lengths)
      out["labels"][i] = split.labels[docs[0]]
      out["loss_weights"][i] = 1
    return out


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
    rows = _read(items, 1)

    def one_side(row: ReadRow, side: int) -> ReadRow:
      doc, start, length = (a[side : side + 1] for a in row.spans)
      return ReadRow(row.split, (doc, start, length), row.tokens[side : side + 1])

    return {
      name: _predictions([one_side(row, side) for row in rows], num_rows, seq_len)
      for side, name in enumerate(("chosen", "rejected"))
    }


def _zeros(num_rows: int, seq_len: int, *names: str, floats: tuple[str, ...] = ()) -> Batch:
  return {
    name: np.zeros((num_rows, seq_len), np.float32 if name in floats else np.int32)
    for name in (*names, *floats)
  }


def _each(spans: Spans) -> Iterator[tuple[int, int, int]]:
  return zip(*(a.tolist() for a in spans))


def _read(items: Sequence[Item], more: int) -> list[ReadRow]:
  """Reads the tokens of rows, with one call per split.

  Args:
    items: The rows.
    more: Tokens to read beyond each span: 1 if the span's last prediction needs its target.
  """
  out: dict[int, ReadRow] = {}
  by_split: dict[int, list[int]] = {}
  for i, item in enumerate(items):
    by_split.setdefault(id(item.split), []).append(i)
  for numbers in by_split.values():
    split = items[numbers[0]].split
    spans = [items[i].pack.spans(items[i].row) for i in numbers]
    doc, start, length = (np.concatenate(a) for a in zip(*spans))
    stored = iter(split.read_many(doc, start, length.astype(np.int64) + more))
    for i, of_row in zip(numbers, spans):
      out[i] = ReadRow(split, of_row, [next(stored) for _ in of_row[0]])
  return [out[i] for i in range(len(items))]


class Inputs(NamedTuple):
  """Values that layouts are made from."""

  masking: Masking | None = None
  has_classes: bool = True


class LayoutEntry(NamedTuple):
  """A kind of layout.

  Attributes:
    make: Makes the layout.
    kinds: Kinds of data that it can lay out, keys of `documents.KINDS`. The first is the usual one.
    summary: One line for the documentation.
    needs_masking: `make` needs `Inputs.masking`.
    has_labels: Rows have a label, whose classes the model must have outputs for.
    predicts_text: Each token of a text is predicted once, so that bits per byte are defined.
  """

  make: Callable[[Inputs], Layout]
  kinds: tuple[str, ...]
  summary: str
  needs_masking: bool = False
  has_labels: bool = False
  predicts_text: bool = False


LAYOUTS: Registry[LayoutEntry] = Registry("layout")
LAYOUTS.add(
  "causal_lm",
  LayoutEntry(
    lambda _: CausalLM(),
    ("text", "seq2seq", "chat"),
    "packed next-token predictions",
    predicts_text=True,
  ),
)
LAYOUTS.add(
  "masked_lm",
  LayoutEntry(
    lambda inputs: MaskedLM(inputs.masking),
    ("text",),
    "packed tokens with some of them masked",
    needs_masking=True,
  ),
)
LAYOUTS.add(
  "classification",
  LayoutEntry(
    lambda inputs: Classification(inputs.has_classes),
    ("classification",),
    "one labelled example per row",
    has_labels=True,
  ),
)
LAYOUTS.add(
  "preference",
  LayoutEntry(lambda _: Preference(), ("preference",), "one pair of answers per row"),
)


def of_kind(kind: str) -> list[str]:
  """Names of the layouts for data of a kind, the usual one first."""
  return [name for name, entry in LAYOUTS.items() if kind in entry.kinds]


def blank(name: str, num_rows: int, seq_len: int, has_classes: bool = True) -> Batch:
  """A batch of padding, for its shapes and dtypes. It needs no data.

  Args:
    name: A key of `LAYOUTS`.
    num_rows: Rows of the batch.
    seq_len: T.
    has_classes: Labels, if the layout has any, are classes and not numbers.
  """
  return LAYOUTS[name].make(Inputs(None, has_classes)).batch([], num_rows, seq_len)


def make(
  name: str, splits: Sequence[tuple[str, source.Split]], masking: Masking | None = None
) -> Layout:
  """Makes a layout for some splits.

  Args:
    name: A key of `LAYOUTS`.
    splits: (name, split) of each source.
    masking: From `masking.make`, if the layout needs it.

  Raises:
    UserError: The layout can't take a split's kind of data, or the splits have different classes.
  """
  entry = LAYOUTS[name]
  first_name, first = splits[0]
  for other, split in splits:
    if split.kind not in entry.kinds:
      raise UserError(
        f"objective.name={name!r} takes data of kind {' or '.join(entry.kinds)}, but "
        f"{other!r} is of kind {split.kind}: set objective.name to "
        f"{' or '.join(of_kind(split.kind))}, or prepare it with --kind={entry.kinds[0]}"
      )
    if split.label_names != first.label_names:
      raise UserError(
        f"{other!r} and {first_name!r} have different classes: {', '.join(split.label_names)} "
        f"and {', '.join(first.label_names)}; prepare them together, or name all classes in the "
        "order of the model's outputs with model.label_names"
      )
  return entry.make(Inputs(masking, bool(first.label_names)))
