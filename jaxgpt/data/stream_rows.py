"""Rows of a stream: readers of files, and the windows in which their rows are packed and shuffled.

A reader has its own files, its own epochs and its own position:

  files   |====== a.jsonl ======|===== b.jsonl =====|
  windows |-- 0 --|-- 1 --|-- 2 --|-- 3 --|
                  ^ start   row 5 of window 2 was handed out last

The position is the place in the files where the current window begins and the number of its rows
that were handed out. Resuming reads and packs that window again and skips those rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxgpt.data import packing as packings
from jaxgpt.data.batch_source import State
from jaxgpt.errors import UserError
from jaxgpt.storage import files as files_lib
from jaxgpt.text.readers import documents as documents_lib
from jaxgpt.text.tokenizers import examples

_CHARS = 1_000_000  # most characters to tokenize in one call


class Reading(NamedTuple):
  """Settings that turn the documents of a stream into rows."""

  tokenizer: Any
  field: str  # column of the text
  seq_len: int
  packing: str  # a key of `packing.PACKINGS`
  window: int  # rows to pack and shuffle together
  seed: int | None  # seed of the order; None keeps the order of the files


def dealt(listed: Sequence[files_lib.File], reader: int, count: int) -> list[files_lib.File]:
  """The files of a reader: at least one, and about as many bytes as every other reader has.

  Files are dealt largest first, each to the reader with the fewest bytes so far.
  """
  loads = [(0, 0, r) for r in range(count)]
  chosen = []
  for i in sorted(range(len(listed)), key=lambda i: -listed[i].size):
    size, number, to = min(loads, key=lambda load: (load[1] > 0 and load[0], load[1], load[2]))
    loads[to] = size + listed[i].size, number + 1, to
    chosen += [i] * (to == reader)
  return [listed[i] for i in sorted(chosen)]


def _order(count: int, seed: int | None, *key: int) -> np.ndarray:
  """A permutation of `count` items from a seed and a key, or the identity if seed is None."""
  if seed is None:
    return np.arange(count)
  draws = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
  return np.argsort(draws, kind="stable")


class _Reader:
  """The documents of a reader's files, epoch after epoch, from any place on."""

  def __init__(self, listed: Sequence[files_lib.File], reading: Reading, number: int):
    self._files, self._reading, self._reader_number = listed, reading, number
    self._documents: Any = None
    self.seek({"epoch": 0, "file": 0, "record": 0, "account": documents_lib.Dropped().to_json()})

  def seek(self, place: State) -> None:
    """Goes to a place, by reading its file again up to there."""
    self.close()
    self._epoch, self._number = place["epoch"], place["file"]
    self._before = place["account"]  # account of the files before this one
    self._open(place["record"])

  def place(self) -> State:
    """The position: epoch, index of the file in the epoch's order, records read from it."""
    return {
      "epoch": self._epoch,
      "file": self._number,
      "record": self._dropped.read,
      "account": self._before,
    }

  def progress(self) -> State:
    """The epochs and the account up to here, for reports."""
    return {
      "epochs": self._epoch + self._number / len(self._files),
      "account": self._total().to_json(),
    }

  def _total(self) -> documents_lib.Dropped:
    total = documents_lib.Dropped()
    total.merge(self._before)
    total.merge(self._dropped.to_json())
    return total

  def _open(self, skip: int = 0) -> None:
    """Opens the current file and skips its first records."""
    order = _order(len(self._files), self._reading.seed, self._reader_number, self._epoch)
    self._dropped = documents_lib.Dropped()
    self._documents = documents_lib.documents(
      [self._files[order[self._number]]],
      dropped=self._dropped,
      fields={"text": self._reading.field},
    )
    while self._dropped.read < skip and next(self._documents, None) is not None:
      pass

  def take(self, chars: int) -> tuple[list[documents_lib.Document], bool]:
    """Reads documents with about `chars` characters. Also returns whether they end an epoch."""
    out: list[documents_lib.Document] = []
    while chars > 0:
      document = next(self._documents, None)
      if document is not None:
        out.append(document)
        chars -= len(document.text)
        continue
      self._before = self._total().to_json()
      self._number += 1
      ended = self._number == len(self._files)
      if ended:
        self._check_not_empty()
        self._epoch, self._number = self._epoch + 1, 0
      self._open()
      if ended:
        return out, True
    return out, False

  def drop(self, rule: str, where: str, why: str) -> None:
    """Counts a document that was read and could not be used."""
    self._dropped.add(rule, where, why)

  def _check_not_empty(self) -> None:
    total = self._total()
    if not total.kept:
      raise UserError(
        f"data.stream: no document with text in {len(self._files)} files of reader "
        f"{self._reader_number}; {'; '.join(total.lines()) or 'they are empty'}"
      )

  def close(self) -> None:
    """Closes the current file."""
    if self._documents is not None:
      self._documents.close()


class Rows(grain.IterDataset):
  """Rows of a host: lists of spans, each with the token after it.

  Args:
    readers: (number, files) of each of the host's readers.
    reading: How documents become rows.
    rows: Rows of a batch that each reader provides, one reader after another.
  """

  def __init__(
    self, readers: Sequence[tuple[int, Sequence[files_lib.File]]], reading: Reading, rows: int
  ):
    super().__init__()
    self._readers, self._reading, self._rows = readers, reading, rows

  def __iter__(self) -> "_InTurns":
    return _InTurns(
      [_RowIterator(files, self._reading, number) for number, files in self._readers], self._rows
    )


class _InTurns(grain.DatasetIterator):
  """Takes `rows` rows of each reader in turn.

  Its state, between batches, lists the states of the readers.
  """

  def __init__(self, readers: list["_RowIterator"], rows: int):
    super().__init__()
    self._readers, self._rows, self._taken = readers, rows, 0

  def __next__(self) -> list[np.ndarray]:
    row = next(self._readers[self._taken // self._rows])
    self._taken = (self._taken + 1) % (len(self._readers) * self._rows)
    return row

  def get_state(self) -> list[State]:
    assert self._taken == 0, "a position inside a batch"
    return [reader.get_state() for reader in self._readers]

  def set_state(self, states: list[State]) -> None:
    for reader, state in zip(self._readers, states, strict=True):
      reader.set_state(state)
    self._taken = 0

  def close(self) -> None:
    super().close()
    for reader in self._readers:
      reader.close()


class _RowIterator(grain.DatasetIterator):
  """Iterates over the rows of windows.

  Its state is `start`, the place where the current window begins, and `row`, the number of its rows
  that were handed out. Reports use `now`, the progress of the reader, and `changed`, the number of
  windows that differed when they were read again.
  """

  def __init__(self, listed: Sequence[files_lib.File], reading: Reading, number: int):
    super().__init__()
    self._reader, self._reading = _Reader(listed, reading, number), reading
    self._reader_number = number
    self._changed = 0
    self._go_on()

  def _go_on(self) -> None:
    """Moves to the next window."""
    self._start, self._row = self._reader.place(), 0
    self._rows: list[Any] | None = None
    self._now = self._reader.progress()

  def get_state(self) -> State:
    return {"start": self._start, "row": self._row, "now": self._now, "changed": self._changed}

  def set_state(self, state: State) -> None:
    self._reader.seek(state["start"])
    self._start, self._row, self._rows = state["start"], state["row"], None
    self._now, self._changed = state["now"], state["changed"]

  def __next__(self) -> list[np.ndarray]:
    while self._rows is None:
      self._rows, before = self._window(), self._now
      self._now = self._reader.progress()
      self._changed += self._row > 0 and self._now != before
      if self._row >= len(self._rows):  # the window was longer the first time
        self._go_on()
    row = self._rows[self._row]
    self._row += 1
    if self._row == len(self._rows):
      self._go_on()
    return row

  def _window(self) -> list[list[np.ndarray]]:
    """Reads the next window: its rows, shuffled."""
    r, start = self._reading, self._start
    stored: list[np.ndarray] = []
    missing, ended, empty = r.window * r.seq_len, False, 0
    while missing > 0 and not (ended and stored):
      documents, ended = self._reader.take(min(_CHARS, r.window * r.seq_len))
      encoded = examples.or_errors(
        documents, lambda batch: examples.encode_batch(batch, "text", r.tokenizer)
      )
      new = []
      for document, found in zip(documents, encoded):
        if isinstance(found, UserError):
          self._reader.drop("tokenizer", document.source, str(found))
        else:
          new.append(found[0].ids)
      stored += new
      empty += ended and not stored
      if empty > 1:  # a whole epoch
        raise UserError(
          "data.stream: the tokenizer fails on every document, such as "
          f"{documents[-1].source if documents else '?'}; name another tokenizer"
        )
      missing -= sum(len(ids) - 1 for ids in new)
    pack = packings.PACKINGS[r.packing]([len(ids) - 1 for ids in stored], r.seq_len)
    order = _order(
      pack.num_rows, r.seed, self._reader_number, start["epoch"], start["file"], start["record"]
    )
    return [
      [
        stored[doc][first : first + length + 1]
        for doc, first, length in zip(*(a.tolist() for a in pack.spans(row)))
      ]
      for row in order
    ]

  def close(self) -> None:
    super().close()
    self._reader.close()
