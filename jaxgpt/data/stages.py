"""Stages: steps with another batch size or sequence length than the rest of the run.

`data.stages` = ((steps, batch_size, seq_len), …) come before the steps with the config's own
`data.batch_size` and `data.seq_len`:

  step      0            1,000              3,000
            | B 32, T 256 | B 64, T 256      | B 64, T 1024 = the config's own
  rows      0          32,000            160,000
  of T 256

Rows of one length form one endless sequence, which stages of that length continue. Its position
before step N is a sum over the stages before N, so the batch at step N still depends on nothing but
N. Rows of another length are packed anew, and begin at their own first epoch.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import grain
import ml_collections

from jaxgpt.config.keys.training import most_overlap
from jaxgpt.data import batch_source
from jaxgpt.data.batch_source import Batch, BatchIterator, HostCheck
from jaxgpt.data.pipeline import Batches


class Stage(NamedTuple):
  """Steps that share a batch size and a sequence length.

  Attributes:
    start: The first step.
    end: The step after the last one. The last stage of a run has no end: sys.maxsize.
    batch_size: Rows of a global batch (B).
    seq_len: Length of a row (T).
  """

  start: int
  end: int
  batch_size: int
  seq_len: int


def of(c_data: ml_collections.ConfigDict) -> list[Stage]:
  """The stages of a run: those of `data.stages`, and the rest.

  Args:
    c_data: The config's `data` section.
  """
  out, start = [], 0
  for steps, batch_size, seq_len in c_data.stages:
    out.append(Stage(start, start + steps, batch_size, seq_len))
    start += steps
  return [*out, Stage(start, sys.maxsize, c_data.batch_size, c_data.seq_len)]


def configs(c: ml_collections.ConfigDict) -> list[tuple[Stage, ml_collections.ConfigDict]]:
  """Each stage with a copy of the config that has its batch size and sequence length.

  Args:
    c: A resolved config.
  """
  out = []
  for stage in of(c.data):
    own = c.copy_and_resolve_references()
    own.data.update(dict(batch_size=stage.batch_size, seq_len=stage.seq_len, stages=()))
    if own.data.overlap is not None:
      own.data.overlap = max(min(own.data.overlap, most_overlap(stage.seq_len)), 0)
    out.append((stage, own))
  return out


def rows_before(stages: Sequence[Stage], seq_len: int, step: int) -> int:
  """The rows of a length in all steps before a step."""
  return sum(
    stage.batch_size * max(min(step, stage.end) - stage.start, 0)
    for stage in stages
    if stage.seq_len == seq_len
  )


class StagedBatches(batch_source.FunctionOfStep):
  """Batches of several stages, as a `BatchSource`. Each method takes steps of the whole run.

  Attributes:
    batch_size, seq_len: Those of the last stage.
    digest: See `BatchSource`.
  """

  def __init__(self, stages: Sequence[Stage], by_length: dict[int, Batches]):
    """Combines batches of each length.

    Args:
      stages: From `of`.
      by_length: {seq_len: batches of this length, of any size}.
    """
    self.stages = list(stages)
    self._by_length = by_length
    self._parts = [
      by_length[s.seq_len].starting(s.start, rows_before(stages, s.seq_len, s.start), s.batch_size)
      for s in stages
    ]
    last = self._parts[-1]
    self.batch_size, self.seq_len, self.digest = last.batch_size, last.seq_len, last.digest

  def at(self, step: int) -> Batches:
    """The batches of the stage that a step is in, by step of the whole run."""
    return next(part for stage, part in zip(self.stages, self._parts) if step < stage.end)

  def batch(self, step: int, host_index: int = 0, host_count: int = 1) -> Batch:
    """See `Batches.batch`."""
    return self.at(step).batch(step, host_index, host_count)

  def blank(self, num_rows: int) -> Batch:
    """See `BatchSource`, for batches of the last stage."""
    return self._parts[-1].blank(num_rows)

  def iterate(
    self,
    start_step: int = 0,
    *,
    host_index: int = 0,
    host_count: int = 1,
    threads: int = 4,
    prefetch: int = 4,
  ) -> BatchIterator:
    """See `BatchSource`."""
    for part in self._parts:
      part.check_hosts(host_index, host_count)
    steps = grain.MapDataset.range(start_step, sys.maxsize)
    batches = steps.map(lambda step: self.batch(step, host_index, host_count))
    return batch_source.prefetched(batches, threads, prefetch)

  def epochs(self, step: int) -> dict[str, float]:
    """Passes over each source before a step, added up over the lengths of rows."""
    out: dict[str, float] = {}
    for seq_len, batches in self._by_length.items():
      whole = batches.starting(0, rows_before(self.stages, seq_len, step), 1)
      for name, epochs in whole.epochs(0).items():
        out[name] = out.get(name, 0) + epochs
    return out

  def host_checks(self) -> list[HostCheck]:
    """See `BatchSource`. `digest` covers all of the data."""
    return []

  def describe(self, host_count: int) -> list[str]:
    """See `BatchSource`: the stages, and what each length leaves out."""
    lines = [
      f"{'after that' if stage.end == sys.maxsize else f'{stage.end - stage.start:,} steps'}: "
      f"batches of {stage.batch_size:,} x {stage.seq_len:,} tokens"
      for stage in self.stages
    ]
    return lines + [line for b in self._by_length.values() for line in b.describe(host_count)]

  def summary(self) -> str:
    """See `BatchSource`."""
    return f"{len(self.stages)} stages; in the last one {self._parts[-1].summary()}"
