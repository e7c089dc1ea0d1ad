"""Streams: batches of files that are read, tokenized and packed while training.

A stream has no random access: a batch depends on the ones before it. So a checkpoint contains the
position of each reader (`stream_rows`). The readers of a run share the files, and each provides its
own rows of every batch. The hosts share the readers, so that a run goes on with another number of
hosts if that divides the readers:

  rows of a batch   | 0 1 2 | 3 4 5 | 6 7 8 | 9 10 11 |
  readers           |   0   |   1   |   2   |    3    |
  two hosts         |    host 0     |     host 1      |
"""

import collections
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import grain
from etils import epath

from jaxgpt.data import layouts, pipeline
from jaxgpt.data.batch_source import Batching, BatchIterator, HostCheck, State
from jaxgpt.data.layouts import Batch
from jaxgpt.data.stream_rows import Reading, Rows, dealt
from jaxgpt.errors import UserError
from jaxgpt.storage import files as files_lib
from jaxgpt.storage.passed_over import PassedOver
from jaxgpt.text.prepare import shards
from jaxgpt.text.readers import documents as documents_lib
from jaxgpt.text.readers import formats
from jaxgpt.text.tokenizers.base import Tokenizer

_REMEMBERED = 2  # steps to remember: the loop reads metrics one step late


_Last: TypeAlias = collections.OrderedDict[
  int, tuple[Batch, State]
]  # step -> batch, state after it


def make(
  addresses: str,
  path: epath.PathLike,
  tokenizer: Tokenizer,
  batching: Batching,
  *,
  field: str = "text",
  window: int = 512,
  readers: int = 0,
) -> "Stream":
  """Lists the files of a stream. It reads none of them yet.

  Args:
    addresses: Files, folders, patterns and URLs as for `jaxgpt data`, separated by commas.
    path: The prepared folders (`data.path`) with the tokenizer and the held-out splits.
    tokenizer: The tokenizer of these folders.
    batching: Size, packing and order of the rows. `shuffle` permutes the files in each epoch and
      the rows of each window.
    field: Column of the text, in files with columns.
    window: Rows of a reader to pack and shuffle together.
    readers: Readers that share the files. 0: one for each host on which the run begins.

  Raises:
    UserError: A path does not exist, or an extra is missing.
  """
  rest = PassedOver()
  listed = documents_lib.find([os.fspath(f) for f in pipeline.folders(addresses)], (), rest)
  formats.check_extras(listed)
  seed = batching.seed % 2**64 if batching.shuffle else None
  reading = Reading(tokenizer, field, batching.seq_len, batching.packing, window, seed)
  digest = pipeline.digest_of([shards.read_manifest(f)["digest"] for f in pipeline.folders(path)])
  return Stream(
    addresses,
    listed,
    reading,
    batching.batch_size,
    digest=digest,
    passed_over=str(rest),
    readers=readers,
  )


class Stream:
  """Batches of a stream in order, with the arrays of `layouts.CausalLM`, as a `BatchSource`.

  Each reader has its own files, epoch after epoch. An epoch contains each of their tokens once.

  Attributes:
    files: The files of all hosts.
    files_digest: SHA-256 of their names and sizes.
    batch_size: Rows of a global batch (B).
    seq_len: Length of a row (T).
    digest: Digest of the prepared folders that belong to the stream.
    state_key: Key of the positions of all readers in a checkpoint.
  """

  state_key: str | None = "stream"

  def __init__(
    self,
    addresses: str,
    listed: Sequence[files_lib.File],
    reading: Reading,
    batch_size: int,
    *,
    digest: str,
    passed_over: str = "",
    readers: int = 0,
  ):
    """Use `make`."""
    self._readers = readers  # 0: not known before `iterate` or `set_state`
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
      "can't be looked up, and the run resumes exactly only with the same files and on a number of "
      "hosts that divides its readers (data.stream_readers, or as many as the hosts on which it "
      "began)",
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
      host_index: This host, which determines its readers.
      host_count: Hosts that share the batch.
      threads: Unused: one thread makes batches, and tokenizers have their own threads.
      prefetch: Batches to make ahead of time.

    Returns:
      An endless iterator. Its `close()` ends the thread.

    Raises:
      UserError: There are fewer files than readers, or the readers do not divide the batch size,
        or host_count does not divide the readers. While iterating: no file has a document.
    """
    del threads
    if self.batch_size % host_count:
      raise UserError(
        f"data.batch_size={self.batch_size} does not split evenly over {host_count} "
        "hosts; choose a multiple"
      )
    self._readers = self._readers or host_count
    own = self._own_readers(host_index, host_count)
    rows = self.batch_size // host_count
    readers = [(reader, dealt(self.files, reader, self._readers)) for reader in own]
    batches = Rows(readers, self._reading, rows // len(own)).batch(
      rows, batch_fn=lambda pieces: layouts.packed(pieces, rows, self.seq_len)
    )
    iterator = iter(
      grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)
    )
    if self._begin is not None:
      iterator.set_state(self._begin)
    self._begin = iterator.get_state()
    return _Remembering(iterator, start_step, self._last)

  def _own_readers(self, host_index: int, host_count: int) -> range:
    """Numbers of a host's readers.

    Raises:
      UserError: The readers can't share the batch or the files, or the hosts the readers.
    """
    name = f"data.stream_readers={self._readers}"
    if self.batch_size % self._readers:
      raise UserError(
        f"data.batch_size={self.batch_size} does not split evenly over {name}; choose a multiple"
      )
    if len(self.files) < self._readers:
      raise UserError(
        f"data.stream={self._addresses!r} has {len(self.files)} files for {self._readers} readers, "
        "each of which reads its own; split them, or lower data.stream_readers"
      )
    if self._readers % host_count:
      raise UserError(
        f"{name} does not split evenly over {host_count} hosts; train on a number of hosts that "
        f"divides it. To use any number, begin with a larger data.stream_readers, or prepare "
        "the files with `jaxgpt data`"
      )
    each = self._readers // host_count
    return range(host_index * each, (host_index + 1) * each)

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

    This is the mean position of its readers, which are up to one window ahead of the rows.
    """
    if step - 1 not in self._last:
      return {}
    epochs = [state["now"]["epochs"] for state in self._last[step - 1][1]]
    return {"stream": sum(epochs) / len(epochs)}

  def account(self) -> list[str]:
    """See `BatchSource`: documents that this host has read and left out so far."""
    now, states = documents_lib.Dropped(), self.get_state() or []
    for state in states:
      now.merge(state["now"]["account"])
    times = sum(state["changed"] for state in states)
    changed = (
      [
        f"when the run went on, files were not what they had been {times} times: some documents "
        "were used twice or not at all"
      ]
      if times
      else []
    )
    return [
      f"data.stream: {now.read:,} documents read, {now.read - now.kept:,} left out",
      *now.lines(),
      *changed,
    ]

  def get_state(self) -> State:
    """Positions of this host's readers after the last batch, or None before the first."""
    return next(reversed(self._last.values()))[1] if self._last else self._begin

  def merge_states(self, states: list[State]) -> State:
    """See `BatchSource`: plain JSON with the states of all readers in order."""
    # The key is from runs in which each host was one reader.
    return {"files": self.files_digest, "hosts": [reader for host in states for reader in host]}

  def set_state(self, merged: State, host_index: int, host_count: int) -> None:
    """Makes `iterate` resume from a result of `merge_states`.

    Raises:
      UserError: It belongs to other files or readers, or the hosts can't share the readers.
    """
    if merged["files"] != self.files_digest:
      raise UserError(
        f"the files of data.stream={self._addresses!r} are not those that the run "
        "was reading: their names or sizes have changed; put them back, or start "
        "anew in another --workdir"
      )
    states = merged["hosts"]
    if self._readers not in (0, len(states)):
      raise UserError(
        f"data.stream_readers={self._readers}, but the checkpoint has the positions of "
        f"{len(states)}; set it to {len(states)} or 0"
      )
    self._readers = len(states)
    own = self._own_readers(host_index, host_count)
    self._begin = states[own.start : own.stop]


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
