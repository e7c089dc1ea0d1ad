"""Batches of text that is read, tokenized and packed while training: sources without random access.

A batch here is a function of what came before it, so the state of an iterator (Grain's) stands in a
checkpoint: where the reading of each host was. Rows are packed and shuffled in windows of some
hundred rows; the state names the place in the files where the window begins and how many of its
rows are out, and whoever takes it up reads that window again.
"""

import collections
import hashlib
import json
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxgpt.data import layouts, pipeline
from jaxgpt.data import packing as packings
from jaxgpt.data.batch_source import HostCheck
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import shards
from jaxgpt.text.readers import documents as documents_lib
from jaxgpt.text.readers import formats
from jaxgpt.text.tokenizers import examples

_CHARS = 1_000_000  # of text that are tokenized in one call, at most
_REMEMBERED = 2  # steps that can still be asked for: the loop reads metrics one step late


class Reading(NamedTuple):
  """How the documents of a stream become rows."""

  tokenizer: Any
  field: str  # column of the text
  seq_len: int
  packing: str  # a key of `packing.PACKINGS`
  window: int  # rows that are packed and shuffled together
  seed: int | None  # of the order; None: that of the files


def make(
  addresses,
  path,
  tokenizer,
  *,
  field="text",
  seq_len,
  batch_size,
  packing="best_fit",
  window=512,
  seed=0,
  shuffle=True,
):
  """Lists the files of a stream; reads none of them yet.

  Args:
    addresses: as `jaxgpt data` takes them, separated by commas.
    path: the prepared folders (`data.path`) whose tokenizer and held-out splits go with it.
    tokenizer: of these folders.
    field: the column of the text, in files that have columns.
    seq_len, batch_size, packing, seed: as in `pipeline.make`.
    window: rows that are packed and shuffled together.
    shuffle: permute the files anew each epoch, and the rows of each window.

  Returns:
    A Stream.

  Raises:
    UserError: a path that is not there, or a missing extra.
  """
  listed = documents_lib.find(pipeline.folders(addresses))
  formats.check_extras(listed)
  reading = Reading(tokenizer, field, seq_len, packing, window, seed % 2**64 if shuffle else None)
  digest = pipeline.digest_of([shards.read_manifest(f)["digest"] for f in pipeline.folders(path)])
  return Stream(addresses, listed, reading, batch_size, digest)


class Stream:
  """Batches of a stream, in their order, with the arrays of `layouts.CausalLM`.

  Each host reads files of its own, epoch after epoch; an epoch holds each of their tokens once.

  Attributes:
    files: list of `files.File`.
    files_digest: sha256 of their names and sizes.
    batch_size: global B.
    seq_len: T.
    digest: of the prepared folders that go with it.
    state_key: where a checkpoint keeps the reading of all hosts.
  """

  state_key: str | None = "stream"

  def __init__(self, addresses, listed, reading, batch_size, digest):
    """Use `make`."""
    self._addresses, self.files, self._reading = addresses, listed, reading
    self.batch_size, self.seq_len, self.digest = batch_size, reading.seq_len, digest
    self.files_digest = hashlib.sha256(
      json.dumps([(file.source, file.size) for file in listed]).encode()
    ).hexdigest()
    self._begin = None  # the state to go on from
    self._last = collections.OrderedDict()  # step -> (batch, state after it)

  def host_checks(self):
    """All hosts must see the same files."""
    return [
      HostCheck(
        f"the digest of the files of data.stream={self._addresses!r}",
        self.files_digest,
        "point data.stream at the same files on all hosts",
      )
    ]

  def summary(self):
    """Files and documents read, in words."""
    read = self.account()[0].removeprefix("data.stream: ")
    return f"data.stream has {len(self.files):,} files; {read}"

  def describe(self, host_count):
    """What a user should know before it starts, in lines."""
    size = sum(file.size for file in self.files)
    return [
      f"data.stream: {len(self.files):,} file{'s' * (len(self.files) > 1)} of "
      f"{size / 1e6:,.1f} MB, read and tokenized while training, by {host_count} "
      f"host{'s' * (host_count > 1)}",
      "  a stream has no random access, so less is promised than for a prepared folder: it is "
      f"shuffled by file and within {self._reading.window} rows only; which documents were in a "
      "step can't be looked up; the run goes on exactly, but only on as many hosts and with "
      "the same files",
    ]

  def blank(self, rows):
    """A batch of padding, whose shapes and dtypes are those of all batches of so many rows."""
    return layouts.packed([], rows, self.seq_len)

  def iterate(self, start_step=0, *, host_index=0, host_count=1, threads=1, prefetch=4):
    """Iterates over a host's batches [B / host_count, T], from where `set_state` said.

    Args:
      start_step: the number of the first one.
      host_index, host_count: which files it reads.
      threads: does nothing: batches are made in one thread, tokenizers have threads of their own.
      prefetch: batches that are made ahead of time.

    Returns:
      An iterator without end; its `close()` ends the thread.

    Raises:
      UserError: hosts without files, or that do not divide the batch size. Later: no document in
        all of the files.
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

  def batch(self, step):
    """This host's batch at one of the last steps.

    Raises:
      UserError: it was handed out earlier, or never.
    """
    if step not in self._last:
      raise UserError(
        f"step {step} of data.stream={self._addresses!r} can't be made again: a "
        "stream has no random access"
      )
    return self._last[step][0]

  def epochs(self, step):
    """How often this host's files were gone through before one of the last steps: {name: epochs}.

    It is the reading that is told of, which is up to a window ahead.
    """
    return {"stream": self._last[step - 1][1]["now"]["epochs"]} if step - 1 in self._last else {}

  def account(self):
    """What this host has read and left out up to now, in lines."""
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

  def get_state(self):
    """Where this host is after the last batch that it handed out: plain JSON; None: nowhere yet."""
    return next(reversed(self._last.values()))[1] if self._last else self._begin

  def merge_states(self, states):
    """What a checkpoint keeps: the states of all hosts, by their numbers; plain JSON."""
    return {"files": self.files_digest, "hosts": states}

  def set_state(self, merged, host_index, host_count):
    """Lets `iterate` go on from what `merge_states` returned.

    Raises:
      UserError: it is of other files, or of another number of hosts.
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
  """An iterator of Grain that keeps its last elements, and its state after each."""

  def __init__(self, iterator, step, last):
    self._iterator, self._step, self._last = iterator, step, last
    last.clear()

  def __iter__(self):
    return self

  def __next__(self):
    batch = next(self._iterator)
    self._last[self._step] = batch, self._iterator.get_state()
    self._step += 1
    if len(self._last) > _REMEMBERED:
      self._last.popitem(last=False)
    return batch

  def close(self):
    self._iterator.close()


def _dealt(listed, host, count):
  """The files of a host: as many bytes as others have, about, and at least one file."""
  loads = [(0, 0, h) for h in range(count)]
  chosen = []
  for i in sorted(range(len(listed)), key=lambda i: -listed[i].size):
    size, number, to = min(loads, key=lambda load: (load[1] > 0 and load[0], load[1], load[2]))
    loads[to] = size + listed[i].size, number + 1, to
    chosen += [i] * (to == host)
  return [listed[i] for i in sorted(chosen)]


def _order(count, seed, *key):
  """A permutation of `count`, drawn from a seed and a key; that of the files where seed is None."""
  if seed is None:
    return np.arange(count)
  draws = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
  return np.argsort(draws, kind="stable")


class _Reader:
  """The documents of some files, epoch after epoch, from any place on."""

  def __init__(self, listed, reading, host):
    self._files, self._reading, self._host = listed, reading, host
    self._documents = None
    self.seek({"epoch": 0, "file": 0, "record": 0, "account": documents_lib.Dropped().to_json()})

  def seek(self, place):
    """Goes to a place; reads the file again up to it."""
    self.close()
    self._epoch, self._number = place["epoch"], place["file"]
    self._before = place["account"]  # of the files before this one
    self._open(place["record"])

  def place(self):
    """Where this is: epoch, number of the file in its order, records of it that were met."""
    return {
      "epoch": self._epoch,
      "file": self._number,
      "record": self._dropped.read,
      "account": self._before,
    }

  def progress(self):
    """What is told of a place: epochs, and the account up to it."""
    return {
      "epochs": self._epoch + self._number / len(self._files),
      "account": self._total().to_json(),
    }

  def _total(self):
    total = documents_lib.Dropped()
    total.merge(self._before)
    total.merge(self._dropped.to_json())
    return total

  def _open(self, skip=0):
    """Opens the file at hand, and passes over its first records."""
    order = _order(len(self._files), self._reading.seed, self._host, self._epoch)
    self._dropped = documents_lib.Dropped()
    self._documents = documents_lib.documents(
      [self._files[order[self._number]]],
      dropped=self._dropped,
      fields={"text": self._reading.field},
    )
    while self._dropped.read < skip and next(self._documents, None) is not None:
      pass

  def take(self, chars):
    """Documents with about so many characters, and whether they end an epoch."""
    out = []
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

  def _check_not_empty(self):
    total = self._total()
    if not total.kept:
      raise UserError(
        f"data.stream: no document with text in {len(self._files)} files of host "
        f"{self._host}; {'; '.join(total.lines()) or 'they are empty'}"
      )

  def close(self):
    if self._documents is not None:
      self._documents.close()


class _Rows(grain.IterDataset):
  """Rows of a host: lists of stored tokens, each span with the token after it."""

  def __init__(self, listed, reading, host):
    super().__init__()
    self._arguments = listed, reading, host

  def __iter__(self):
    return _RowIterator(*self._arguments)


class _RowIterator(grain.DatasetIterator):
  """State: the place where the window at hand begins, and how many of its rows are out.

  And what is told of it: `now`, how far the reading has come; `changed`, how many windows were not
  what they had been when they were read again.
  """

  def __init__(self, listed, reading, host):
    super().__init__()
    self._reader, self._reading, self._host = _Reader(listed, reading, host), reading, host
    self._changed = 0
    self._go_on()

  def _go_on(self):
    """To the next window."""
    self._start, self._row, self._rows = self._reader.place(), 0, None
    self._now = self._reader.progress()

  def get_state(self):
    return {"start": self._start, "row": self._row, "now": self._now, "changed": self._changed}

  def set_state(self, state):
    self._reader.seek(state["start"])
    self._start, self._row, self._rows = state["start"], state["row"], None
    self._now, self._changed = state["now"], state["changed"]

  def __next__(self):
    while self._rows is None:
      self._rows, before = self._window(), self._now
      self._now = self._reader.progress()
      self._changed += self._row > 0 and self._now != before
      if self._row >= len(self._rows):  # of a window that was longer the first time
        self._go_on()
    row = self._rows[self._row]
    self._row += 1
    if self._row == len(self._rows):
      self._go_on()
    return row

  def _window(self):
    """Reads on from here; the rows of what was read, in the order in which they come."""
    r, start = self._reading, self._start
    stored, missing, ended = [], r.window * r.seq_len, False
    while missing > 0 and not (ended and stored):
      documents, ended = self._reader.take(min(_CHARS, r.window * r.seq_len))
      new = [e.ids for (e,) in examples.encode_batch(documents, "text", r.tokenizer)]
      stored += new
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

  def close(self):
    super().close()
    self._reader.close()
