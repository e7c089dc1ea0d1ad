"""Batch sources: the protocol between training data and the training loop.

A batch source yields this host's rows of each global batch. Two are built in: prepared folders
(`pipeline.Batches`), whose batch at step N is a pure function of N, and streams (`stream.Stream`),
whose position goes into every checkpoint. `from_config.BATCH_SOURCES` lists them.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, TypeAlias

import grain

from jaxgpt.data import packing as packings
from jaxgpt.data.layouts import Batch
from jaxgpt.errors import UserError

State: TypeAlias = Any  # plain JSON


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batching:
  """Settings of batches that all sources share.

  Attributes:
    seq_len: Length of a row (T), in predictions or tokens depending on the layout.
    batch_size: Rows of a step over all hosts (global B).
    packing: A key of `packing.PACKINGS`.
    seed: Seed of the order, any integer.
    shuffle: Permute the order in each epoch. Otherwise it is that of the documents.

  Raises:
    UserError: A value is out of range.
  """

  seq_len: int
  batch_size: int
  packing: str = "best_fit"
  seed: int = 0
  shuffle: bool = True

  def __post_init__(self) -> None:
    for key, value in (("seq_len", self.seq_len), ("batch_size", self.batch_size)):
      if value < 1:
        raise UserError(f"data.{key}={value} must be at least 1")
    if self.packing not in packings.PACKINGS:
      raise UserError(
        f"data.packing={self.packing!r}: choose one of {', '.join(packings.PACKINGS)}"
      )


class HostCheck(NamedTuple):
  """A value that all hosts must agree on before training starts.

  Attributes:
    name: The value in words, such as "the digest of the files of data.stream='a.jsonl'".
    value: The value on this host.
    way_out: What the user does if the hosts disagree.
  """

  name: str
  value: str
  way_out: str


class BatchIterator(Iterator[Batch], Protocol):
  """Batches in step order. `close` ends the threads that make them."""

  def close(self) -> None: ...


class BatchSource(Protocol):
  """Training data, as the loop, `doctor` and the evaluation see it.

  Attributes:
    batch_size: Rows of a step over all hosts (global B).
    seq_len: Length of a row in tokens (T).
    digest: SHA-256 of the source's prepared data, as recorded in the run folder.
    state_key: Key of this source's state in a checkpoint, or None if a batch depends on the step
      number only, so that nothing needs to be saved.
  """

  batch_size: int
  seq_len: int
  digest: str
  state_key: str | None

  def blank(self, num_rows: int) -> Batch:
    """A batch of padding with `num_rows` rows. Its shapes and dtypes hold for every batch."""
    ...

  def iterate(
    self,
    start_step: int = 0,
    *,
    host_index: int = 0,
    host_count: int = 1,
    threads: int = 4,
    prefetch: int = 4,
  ) -> BatchIterator:
    """Iterates over a host's batches [B / host_count, T] from `start_step` on, without end.

    Args:
      start_step: Number of the first step. A source with state starts where `set_state` says.
      host_index: This host, in [0, host_count).
      host_count: Hosts that share the batch.
      threads: Upper bound on the threads that make batches.
      prefetch: Batches to keep ready.

    Raises:
      UserError: host_count does not divide the batch size, or the source can't feed that many.
    """
    ...

  def batch(self, step: int) -> Batch:
    """The batch of one of the last steps, as evidence if a step's loss is not finite.

    Raises:
      UserError: The source can't make it again.
    """
    ...

  def epochs(self, step: int) -> dict[str, float]:
    """Passes over each part of the data before a step: {name: epochs}, with fractions."""
    ...

  def host_checks(self) -> list[HostCheck]:
    """Values beyond `digest` that must be equal on all hosts."""
    ...

  def describe(self, host_count: int) -> list[str]:
    """Lines to print before training: what a user should know about this source."""
    ...

  def summary(self) -> str:
    """Size and health in a few words, for `jaxgpt doctor`, after the first batch was read."""
    ...

  def account(self) -> list[str]:
    """Lines to print after training: documents read and left out."""
    ...

  def get_state(self) -> State:
    """This host's position after the last batch it handed out, or None without `state_key`."""
    ...

  def merge_states(self, states: list[State]) -> State:
    """The entry `state_key` of a checkpoint.

    Args:
      states: `get_state()` of every host, in the order of their numbers.
    """
    ...

  def set_state(self, merged: State, host_index: int, host_count: int) -> None:
    """Makes `iterate` resume from an entry of `merge_states`.

    Raises:
      UserError: It belongs to other files, or to another number of hosts.
    """
    ...


class FunctionOfStep:
  """What batch sources share whose batch at step N depends on N only: nothing needs to be saved."""

  state_key: str | None = None

  def account(self) -> list[str]:
    """See `BatchSource`. Empty: `jaxgpt data` printed the account."""
    return []

  def get_state(self) -> State:
    """See `BatchSource`. None, as `state_key` is None."""
    return None

  def merge_states(self, states: list[State]) -> State:
    """See `BatchSource`. None, as `state_key` is None."""
    del states
    return None

  def set_state(self, merged: State, host_index: int, host_count: int) -> None:
    """See `BatchSource`. Does nothing, as `state_key` is None."""


def prefetched(batches: grain.MapDataset, threads: int, prefetch: int) -> BatchIterator:
  """Batches that threads make ahead of time. `threads` or `prefetch` 0: they are made on demand."""
  options = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
  return iter(batches.to_iter_dataset(options))
