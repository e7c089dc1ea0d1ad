"""Streams: batches of files that are read, tokenized and packed while training.

A stream has no random access: a batch depends on the ones before it. So a checkpoint contains the
position of each host (the state of a Grain iterator). Rows are packed and shuffled in windows of
some hundred rows:

  files   |====== a.jsonl ======|===== b.jsonl =====|
  windows |-- 0 --|-- 1 --|-- 2 --|-- 3 --|
                  ^ start   row 5 of window 2 was handed out last

The state is the place in the files where the current window begins and the number of its rows that
were handed out. Resuming reads and packs that window again and skips those rows.
"""

import collections
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import grain
import numpy as np
from etils import epath

from jaxgpt.data import layouts, pipeline
from jaxgpt.data import packing as packings
from jaxgpt.data.batch_source import Batching, BatchIterator, HostCheck, State
from jaxgpt.data.layouts import Batch
from jaxgpt.errors import UserError
from jaxgpt.storage import files as files_lib
from jaxgpt.storage.passed_over import PassedOver
from jaxgpt.text.prepare import shards
from jaxgpt.text.readers import documents as documents_lib
from jaxgpt.text.readers import formats
from jaxgpt.text.tokenizers import examples
from jaxgpt.text.tokenizers.base import Tokenizer

_CHARS = 1_000_000  # most characters to tokenize in one call
_REMEMBERED = 2  # steps to remember: the loop reads metrics one step late


_Last: TypeAlias = collections.OrderedDict[
  int, tuple[Batch, State]
]  # step -> batch, state after it


class Reading(NamedTuple):
  """Settings that turn the documents of a stream into rows."""

  tokenizer: Any
  field: str  # column of the text
  seq_len: int
  packing: str  # a key of `packing.PACKINGS`
  window: int  # rows to pack and shuffle together
  seed: int | None  # seed of the order; None keeps the order of the files


def make(
  addresses: str,
  path: epath.PathLike,
  tokenizer: Tokenizer,
  batching: Batching,
  *,
  field: str = "text",
  window: int = 512,
) -> "Stream":
  """Lists the files of a stream. It reads none of them yet.

  Args:
    addresses: Files, folders, patterns and URLs as for `jaxgpt data`, separated by commas.
    path: The prepared folders (`data.path`) with the tokenizer and the held-out splits.
    tokenizer: The tokenizer of these folders.
    batching: Size, packing and order of the rows. `shuffle` permutes the files in each epoch and
      the rows of each window.
    field: Column of the text, in files with columns.
    window: Rows to pack and shuffle together.

  Raises:
    UserError: A path does not exist, or an extra is missing.
  """
  rest = PassedOver()
  listed = documents_lib.find([os.fspath(f) for f in pipeline.folders(addresses)], (), rest)
  formats.check_extras(listed)
  seed = batching.seed % 2**64 if batching.shuffle else None
  reading = Reading(tokenizer, field, batching.seq_len, batching.packing, window, seed)
  digest = pipeline.digest_of([shards.read_manifest(f)["digest"] for f in pipeline.folders(path)])
  return Stream(addresses, listed, reading, batching.batch_size, digest, str(rest))


class Stream:
  """Batches of a stream in order, with the arrays of `layouts.CausalLM`, as a `BatchSource`.

  Each host reads its own files, epoch after epoch. An epoch contains each of their tokens once.

  Attributes:
    files: The files of all hosts.
    files_digest: SHA-256 of their names and sizes.
    batch_size: Rows of a global batch (B).
    seq_len: Length of a row (T).
    digest: Digest of the prepared folders that belong to the stream.
    state_key: Key of the positions of all hosts in a checkpoint.
  """

  state_key: str | None = "stream"

  def __init__(
    self,
    addresses: str,
    listed: Sequence[files_lib.File],
    reading: Reading,
    batch_size: int,
    digest: str,
    passed_over: str = "",
  ):
    """Use `make`."""
    self._passed_over = passed_over
    self._addresses, self.files, self._reading = addresses, listed, reading
    self.batch_size, self.seq_len, self.digest = batch_size, reading.seq_len, digest
    self.files_digest = hashlib.sha256(
      json.dumps([(file.source, file.size) for file in listed]).encode()
    ).hexdigest()
    self._begin: State = None  # the state to resume from
    self._last: _Last = collections.OrderedDict()

  def host_checks(self) -> list[HostCheck]:
    """See `BatchSource`: all hosts must see the same files."""
    return [
      HostCheck(
        f"the digest of the files of data.stream={self._addresses!r}",
        self.files_digest,
        "point data.stream at the same files on all hosts",
      )
    ]

  def summary(self) -> str:
    """See `BatchSource`: the files, and the documents read so far."""
    read = self.account()[0].removeprefix("data.stream: ")
    return f"data.stream has {len(self.files):,} files; {read}"

  def describe(self, host_count: int) -> list[str]:
    """See `BatchSource`: the size of the stream and its limits."""
    size = sum(file.size for file in self.files)
    return [
      f"data.stream: {len(self.files):,} file{'s' * (len(self.files) > 1)} of "
      f"{size / 1e6:,.1f} MB, read and tokenized while training, by {host_count} "
      f"host{'s' * (host_count > 1)}",
      "  a stream promises less than a prepared folder, since it has no random access: it is "
      f"shuffled only by file and within {self._reading.window} rows, the documents of a step "
      "can't be looked up, and the run resumes exactly only on as many hosts and with the same "
      "files",
      *([f"  passed over: {self._passed_over}"] if self._passed_over else []),
    ]

  def blank(self, num_rows: int) -> Batch:
    """See `BatchSource`."""
    return layouts.packed([], num_rows, self.seq_len)

  def iterate(
    self,
    start_step: int = 0,
    *,
    host_index: int = 0,
    host_count: int = 1,
    threads: int = 1,
    prefetch: int = 4,
  ) -> BatchIterator:
    """Iterates over a host's batches [B / host_count, T], starting at the state of `set_state`.

    Args:
      start_step: Number of the first step.
      host_index: This host, which determines the files that it reads.
      host_count: Hosts that share the batch.
      threads: Unused: one thread makes batches, and tokenizers have their own threads.
      prefetch: Batches to make ahead of time.

    Returns:
      An endless iterator. Its `close()` ends the thread.

    Raises:
      UserError: There are fewer files than hosts, or host_count does not divide the batch size.
        While iterating: no file has a document.
    """
    del threads
    if host_count < 1 or self.batch_size % host_count:
      raise UserError(
        f"data.batch_size={self.batch_size} does not split evenly over {host_count} "
        "hosts; choose a multiple"
      )
    if len(self.files) < host_count:
      raise UserError(
        f"data.stream={self._addresses!r} has {len(self.files)} files for "
        f"{host_count} hosts, each of which reads its own; split them"
      )
    mine = _dealt(self.files, host_index, host_count)
    rows = self.batch_size // host_count
    batches = _Rows(mine, self._reading, host_index).batch(
      rows, batch_fn=lambda pieces: layouts.packed(pieces, rows, self.seq_len)
    )
    iterator = iter(
      grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)
    )
    if self._begin is not None:
      iterator.set_state(self._begin)
    self._begin = iterator.get_state()
    return _Remembering(iterator, start_step, self._last)

  def batch(self, step: int) -> Batch:
    """This host's batch of one of the last steps.

    Raises:
      UserError: The step is not one of the last.
    """
    if step not in self._last:
      raise UserError(
        f"step {step} of data.stream={self._addresses!r} can't be made again: a "
        "stream has no random access"
      )
    return self._last[step][0]

  def epochs(self, step: int) -> dict[str, float]:
    """Passes over this host's files before one of the last steps: {name: epochs}.

    This is the position of the reader, which is up to one window ahead of the rows.
    """
    return {"stream": self._last[step - 1][1]["now"]["epochs"]} if step - 1 in self._last else {}

  def account(self) -> list[str]:
    """See `BatchSource`: documents that this host has read and left out so far."""
    now, state = documents_lib.Dropped(), self.get_state()
    if state is not None:
      now.merge(state["now"]["account"])
    changed = (
      [
        f"when the run went on, files were not what they had been {state['changed']} times: "
        "some documents were used twice or not at all"
      ]
      if state and state["changed"]
      else []
    )
    return [
      f"data.stream: {now.read:,} documents read, {now.read - now.kept:,} left out",
      *now.lines(),
      *changed,
    ]

  def get_state(self) -> State:
    """This host's position after the last batch it handed out, or None before the first."""
    return next(reversed(self._last.values()))[1] if self._last else self._begin

  def merge_states(self, states: list[State]) -> State:
    """See `BatchSource`: plain JSON with the states of all hosts in order."""
    return {"files": self.files_digest, "hosts": states}

  def set_state(self, merged: State, host_index: int, host_count: int) -> None:
    """Makes `iterate` resume from a result of `merge_states`.

    Raises:
      UserError: It belongs to other files, or to another number of hosts.
    """
    if merged["files"] != self.files_digest:
      raise UserError(
        f"the files of data.stream={self._addresses!r} are not those that the run "
        "was reading: their names or sizes have changed; put them back, or start "
        "anew in another --workdir"
      )
    if len(merged["hosts"]) != host_count:
      raise UserError(
        f"the run read data.stream={self._addresses!r} on {len(merged['hosts'])} "
        f"hosts and can't go on with it on {host_count}; start as many, or prepare "
        "the files with `jaxgpt data`: then any number goes on"
      )
    self._begin = merged["hosts"][host_index]


class _Remembering:
  """A Grain iterator that keeps its last elements, and its state after each."""

  def __init__(self, iterator: Any, step: int, last: _Last):
    self._iterator, self._step, self._last = iterator, step, last
    last.clear()

  def __iter__(self) -> "_Remembering":
    return self

  def __next__(self) -> Batch:
    batch = next(self._iterator)
    self._last[self._step] = batch, self._iterator.get_state()
    self._step += 1
    if len(self._last) > _REMEMBERED:
      self._last.popitem(last=False)
    return batch

  def close(self) -> None:
    self._iterator.close()


def _dealt(listed: Sequence[files_lib.File], host: int, count: int) -> list[files_lib.File]:
  """The files of a host: at least one, and about as many bytes as every other host has.

  Files are dealt largest first, each to the host with the fewest bytes so far.
  """
  loads = [(0, 0, h) for h in range(count)]
  chosen = []
  for i in sorted(range(len(listed)), key=lambda i: -listed[i].size):
    size, number, to = min(loads, key=lambda load: (load[1] > 0 and load[0], load[1], load[2]))
    loads[to] = size + listed[i].size, number + 1, to
    chosen += [i] * (to == host)
  return [listed[i] for i in sorted(chosen)]


def _order(count: int, seed: int | None, *key: int) -> np.ndarray:
  """A permutation of `count` items from a seed and a key, or the identity if seed is None."""
  if seed is None:
    return np.arange(count)
  draws = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
  return np.argsort(draws, kind="stable")


class _Reader:
  """The documents of a host's files, epoch after epoch, from any place on."""

  def __init__(self, listed: Sequence[files_lib.File], reading: Reading, host: int):
    self._files, self._reading, self._host = listed, reading, host
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
    order = _order(len(self._files), self._reading.seed, self._host, self._epoch)
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
        f"data.stream: no document with text in {len(self._files)} files of host "
        f"{self._host}; {'; '.join(total.lines()) or 'they are empty'}"
      )

  def close(self) -> None:
    """Closes the current file."""
    if self._documents is not None:
      self._documents.close()


class _Rows(grain.IterDataset):
  """Rows of a host: lists of spans, each with the token after it."""

  def __init__(self, listed: Sequence[files_lib.File], reading: Reading, host: int):
    super().__init__()
    self._arguments = listed, reading, host

  def __iter__(self) -> "_RowIterator":
    return _RowIterator(*self._arguments)


class _RowIterator(grain.DatasetIterator):
  """Iterates over the rows of windows.

  Its state is `start`, the place where the current window begins, and `row`, the number of its rows
  that were handed out. Reports use `now`, the progress of the reader, and `changed`, the number of
  windows that differed when they were read again.
  """

  def __init__(self, listed: Sequence[files_lib.File], reading: Reading, host: int):
    super().__init__()
    self._reader, self._reading, self._host = _Reader(listed, reading, host), reading, host
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
      pack.num_rows, r.seed, self._host, start["epoch"], start["file"], start["record"]
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
