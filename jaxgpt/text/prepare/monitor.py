"""How far a job is: tasks count what they read, and a thread of the run reports the sums."""

import contextlib
import pathlib
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from jaxgpt.text.prepare.jobs import Job, Report

PROGRESS = "progress"  # name of a task's file of counts
_REPORT_SECONDS = 10.0
_SHOW_SECONDS = 1.0
_COUNT_SECONDS = 2.0


class Progress:
  """Counts of a task at work, in a file for `Monitor`, which may run on another machine.

  Attributes:
    counts: [documents, bytes] so far.
  """

  def __init__(self, folder: pathlib.Path):
    self._path, self._written = folder / PROGRESS, time.monotonic()
    self.counts = [0, 0]

  def __call__(self, documents: int, num_bytes: int) -> None:
    self.counts[0] += documents
    self.counts[1] += num_bytes
    if time.monotonic() - self._written > _COUNT_SECONDS:
      self._written = time.monotonic()
      self._path.write_text("{} {}".format(*self.counts), encoding="utf-8")


class Status(NamedTuple):
  """How far a job is.

  Attributes:
    job: Its name.
    done, tasks: Finished tasks, and all of them.
    documents: Documents read so far.
    rate: Bytes per second since this run began with the job.
  """

  job: str
  done: int
  tasks: int
  documents: int
  rate: float


class Monitor:
  """Reports how far a job is, from the files of its tasks. A context manager.

  If `report` has a method `show`, it is called with a `Status` every second, and with None at the
  end. Otherwise `report` is called with a line every 10 seconds.
  """

  def __init__(self, job: Job, report: Report):
    self._job, self._report = job, report
    self._show: Callable[[Status | None], None] | None = getattr(report, "show", None)
    self._left = set(range(job.tasks))
    self._documents = self._bytes = 0  # of finished tasks
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> None:
    self._thread.start()

  def __exit__(self, *_: object) -> None:
    self._stop.set()
    self._thread.join()

  def _watch(self) -> None:
    start = time.monotonic()
    self._look()
    before = self._bytes
    while not self._stop.wait(_SHOW_SECONDS if self._show else _REPORT_SECONDS):
      documents, num_bytes = self._look()
      done, seconds = self._job.tasks - len(self._left), time.monotonic() - start
      if self._show:
        rate = (self._bytes + num_bytes - before) / seconds
        self._show(Status(self._job.name, done, self._job.tasks, self._documents + documents, rate))
        continue
      line = f"{self._job.name}: {done} of {self._job.tasks} tasks done"
      if documents:
        line += f", at work on {documents:,} documents, {num_bytes / 1e6:,.0f} MB"
      self._report(f"{line} ({seconds:.0f} s)")
    if self._show:
      self._show(None)

  def _look(self) -> tuple[int, int]:
    """(documents, bytes) of the tasks at work. Adds up those of newly finished tasks."""
    documents = num_bytes = 0
    for path in self._job.folder.glob(f".*/{PROGRESS}"):
      with contextlib.suppress(OSError, ValueError):  # it may be gone, or half written
        more, size = map(int, path.read_text(encoding="utf-8").split())
        documents, num_bytes = documents + more, num_bytes + size
    for rank in sorted(self._left):
      if (done := self._job.done(rank)) is not None:
        self._left.remove(rank)
        self._documents += done["counts"][0]
        self._bytes += done["counts"][1]
    return documents, num_bytes
