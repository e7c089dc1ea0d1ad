"""The writers that a config turns on, opened and driven as one."""

from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from etils import epath

from jaxgpt.errors import UserError, first_line, nearest
from jaxgpt.parallel import distributed
from jaxgpt.run.metric_writers.files import Jsonl
from jaxgpt.run.metric_writers.writer import (
  WRITERS,
  Entry,
  Metrics,
  MetricWriter,
  Run,
  Sample,
)
from jaxgpt.run.process import output


class Writers(MetricWriter):
  """Several writers as one. One that fails is named once, and the run and the others go on."""

  def __init__(self, *writers: MetricWriter):
    self._writers = writers
    self._failing: set[MetricWriter] = set()

  def write(self, step: int, kind: str, metrics: Metrics) -> None:
    for writer in self._writers:
      works = self._try(writer, lambda w: w.write(step, kind, metrics))
      if works and writer in self._failing:
        self._failing.remove(writer)
        output.warn(f"the metric writer {type(writer).__name__} works again")

  def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
    for writer in self._writers:
      self._try(writer, lambda w: w.write_samples(step, samples))

  def _try(self, writer: MetricWriter, call: Callable[[MetricWriter], None]) -> bool:
    try:
      call(writer)
    except Exception as e:  # of a disk, a network, or a user's own code
      if writer not in self._failing:
        self._failing.add(writer)
        kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
        output.warn(
          f"the metric writer {type(writer).__name__} fails, and the run goes on: "
          f"{kind}{first_line(e, 300)}"
        )
      return False
    return True

  def newest(self, step: int, kind: str) -> dict[str, Any] | None:
    found = (writer.newest(step, kind) for writer in self._writers)
    return next((metrics for metrics in found if metrics is not None), None)

  def flush(self) -> None:
    for writer in self._writers:
      self._try(writer, lambda w: w.flush())

  def unwritten(self) -> int:
    """Lines of metrics.jsonl that could not be written."""
    return sum(writer.unwritten for writer in self._writers if isinstance(writer, Jsonl))

  def close(self) -> None:
    for writer in self._writers:
      self._failing.discard(writer)  # what is lost now is lost for good
      self._try(writer, lambda w: w.close())


def check_options(c: ml_collections.ConfigDict) -> None:
  """Raises a UserError for a key of `log.options` that no writer reads."""
  options = [name for entry in WRITERS.values() for name in entry.options]
  for name in c.log.options:
    if name not in options:
      raise UserError(
        f"log.options.{name}: no metric writer reads it; {nearest(name, options)}there are: "
        f"{', '.join(options) or 'none'}"
      )


def make(c: ml_collections.ConfigDict, folder: epath.PathLike, start: int) -> Writers:
  """Opens the writers that a config turns on. Only the first process has any.

  Args:
    c: The resolved config.
    folder: The run folder.
    start: Step at which this start of the run begins.

  Raises:
    UserError: A key of `log.options` that no writer reads, or a writer that cannot be opened.
  """
  check_options(c)
  if not distributed.is_first():
    return Writers()
  run = Run(c, epath.Path(folder), start)
  wanted = [(name, entry) for name, entry in WRITERS.items() if entry.wanted(c)]
  return Writers(*filter(None, (_open(name, entry, run) for name, entry in wanted)))


def _open(name: str, entry: Entry, run: Run) -> MetricWriter | None:
  """A writer, or None, and a warning, if a server or a library fails."""
  try:
    return entry.open(run)
  except UserError:
    raise
  except Exception as e:  # whatever a library raises without a network
    output.warn(
      f"the metric writer {name} can't be opened, and the run goes on without it: "
      f"{type(e).__name__}: {first_line(e, 300)}"
    )
    return None
