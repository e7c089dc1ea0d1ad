"""A layout, and the parts that layouts share.

B rows of a batch, T positions in a row.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from jaxgpt.data import packing as packings
from jaxgpt.data import source

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


def zeros(num_rows: int, seq_len: int, *names: str, floats: tuple[str, ...] = ()) -> Batch:
  return {
    name: np.zeros((num_rows, seq_len), np.float32 if name in floats else np.int32)
    for name in (*names, *floats)
  }


def each(spans: Spans) -> Iterator[tuple[int, int, int]]:
  return zip(*(a.tolist() for a in spans))


def read(items: Sequence[Item], more: int) -> list[ReadRow]:
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


def place(
  out: Batch, row: int, spans: Sequence[np.ndarray], key: str = "tokens", one: bool = False
) -> None:
  """Writes the tokens of a row, with their segments and positions.

  Args:
    out: A batch with `key`, `segment_ids` and `positions`, all [B, T].
    row: Index of the row.
    spans: The tokens of each span.
    key: Name of the array that takes the tokens.
    one: All spans are one segment. False: each is one.
  """
  at = 0
  for segment, ids in enumerate([np.concatenate(spans)] if one else spans, 1):
    here = slice(at, at + len(ids))
    out[key][row, here] = ids
    out["segment_ids"][row, here] = segment
    out["positions"][row, here] = np.arange(len(ids))
    at += len(ids)
