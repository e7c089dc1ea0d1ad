"""Jobs of a preparation and the folder of its unfinished work, which survives a kill at any moment.

A preparation is a sequence of jobs (read, tokenize, …). A job is a number of tasks, which `run_job`
runs.

    WORK/state.json                 marks the folder as ours
    WORK/published.json             fingerprint and digest of the result that is about to be moved
    WORK/NAME-KEY/00012/            outputs of task 12 of a job
    WORK/NAME-KEY/00012/done.json   its account and the sizes of its files
    WORK/NAME-KEY/.00012-PID-…/     a task at work, or the leftovers of a killed one
    WORK/publish/                   the assembled result

A job's key is a hash of everything that its outputs depend on, including the jobs before it. So a
finished task is valid as long as its folder exists, and a process that outlives its run writes only
into folders of its own key.

Every step leaves a state from which the next run continues:

    a task, step by step             after a kill in this step, the next run
    1  make .00012-PID-…/            deletes the hidden folder and repeats the task
    2  write the outputs             the same
    3  write done.json               the same
    4  rename it to 00012/           the same, or takes the task as done

    the result, step by step
    1  assemble WORK/publish/        assembles it again from the tasks
    2  write published.json          the same, because OUT does not have the digest in it
    3  rename OUT to WORK/replaced   renames it back and starts over with step 1
    4  rename WORK/publish to OUT    finds that OUT has the digest. Only WORK is left to delete
    5  delete WORK                   the same. published.json and state.json are deleted last
"""

import ctypes
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, Self

from jaxgpt.errors import UserError
from jaxgpt.storage import strict_json

Account = dict[str, Any]  # the result of a task, as JSON holds it
Report = Callable[[str], None]  # takes a line of text for the user

DONE = "done.json"
_STATE = "state.json"
_PUBLISHED = "published.json"
_LOCK_TRIES = 25
_LOCK_SECONDS = 0.2  # between two tries
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_locks: set[int] = set()  # file descriptors of the locks that this process holds


def _leave_run() -> None:
  """In a process forked from a run: releases the run's locks and dies together with the run.

  The executor of datatrove forks a process that would wait forever if its parent was killed.
  """
  if _locks and sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  while _locks:
    os.close(_locks.pop())


os.register_at_fork(after_in_child=_leave_run)


class Counter(Protocol):
  """Called by a task now and then, with the documents and bytes since the last call."""

  def __call__(self, documents: int, num_bytes: int) -> None: ...


class RunTask(Protocol):
  """The work of one task, which can be pickled and depends only on what the job's key covers."""

  def __call__(self, rank: int, folder: pathlib.Path, progress: Counter) -> Account:
    """Writes the outputs of task `rank` into an empty folder and returns its account."""


@dataclasses.dataclass(frozen=True)
class Job:
  """A step of the preparation: its tasks and the folder of their outputs.

  Attributes:
    name: A word, for folders and reports.
    tasks: Number of tasks. It depends on the inputs only, never on the machines.
    run: Runs one task.
    folder: Folder that holds one folder per task, named by `task_folder`.
    run_id: Identifies the run at work. A process that outlived an earlier run has another one.
  """

  name: str
  tasks: int
  run: RunTask
  folder: pathlib.Path
  run_id: str

  def task_folder(self, rank: int) -> pathlib.Path:
    """The folder of a finished task."""
    return self.folder / f"{rank:05d}"

  def done(self, rank: int) -> dict[str, Any] | None:
    """The record {account, counts, files} of a finished task, or None."""
    folder = self.task_folder(rank)
    try:
      done = json.loads((folder / DONE).read_text(encoding="utf-8"))
      if done.keys() == {"account", "counts", "files"} and all(
        (folder / name).stat().st_size == size for name, size in done["files"].items()
      ):
        return done
    except (OSError, ValueError, AttributeError):
      pass
    return None

  def account(self, rank: int) -> Account | None:
    """The account of a finished task, or None."""
    done = self.done(rank)
    return done and done["account"]

  def failures(self) -> list[pathlib.Path]:
    """Files that describe the tasks that failed in this run."""
    return sorted(self.folder.glob(f".failed-{self.run_id}-*"))

  def missing(self) -> list[int]:
    """Ranks of the unfinished tasks."""
    return [rank for rank in range(self.tasks) if self.account(rank) is None]


def _lock(descriptor: int) -> None:
  """Locks a file. Children of a run that was just killed may hold the lock for a moment."""
  for left in reversed(range(_LOCK_TRIES)):
    try:
      return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      if not left:
        raise
      time.sleep(_LOCK_SECONDS)


class Work:
  """The folder of a run's unfinished work, locked against other runs. A context manager.

  Attributes:
    folder: The folder.
    found: An interrupted run had left it.
  """

  def __init__(self, folder: pathlib.Path, description: dict[str, Any]):
    """Makes the folder, or takes over the one of an interrupted run.

    Args:
      folder: A path whose parent exists.
      description: A JSON-able dict for people who look into the folder.

    Raises:
      UserError: The folder has other content, or another run is at work in it.
    """
    self.folder = folder
    self.found = folder.exists() and any(folder.iterdir())
    if self.found and not any((folder / name).is_file() for name in (_STATE, _PUBLISHED)):
      raise UserError(
        f"{folder} is in the way: unfinished work goes there, but no run of jaxgpt made it; move "
        "it, or choose another --out"
      )
    folder.mkdir(exist_ok=True)
    self._lock = os.open(folder, os.O_RDONLY)
    try:
      _lock(self._lock)
      if not os.path.samestat(os.fstat(self._lock), folder.stat()):
        raise FileNotFoundError
    except (BlockingIOError, FileNotFoundError) as e:
      os.close(self._lock)
      raise UserError(
        f"another run is at work in {folder}; wait for it, or choose another --out"
      ) from e
    _locks.add(self._lock)
    (folder / _STATE).write_text(strict_json.dumps(description, indent=1) + "\n", encoding="utf-8")
    self._key, self._run_id = "", secrets.token_hex(4)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    _locks.discard(self._lock)
    os.close(self._lock)

  def job(self, name: str, tasks: int, run: RunTask, depends: Any, report: Report) -> Job:
    """The next job.

    Outputs of a job of this name with another key are deleted, because their inputs have changed.

    Args:
      name, tasks, run: As in `Job`.
      depends: A JSON-able value. The job's key covers it and all jobs before.
      report: Called with a line if outputs are deleted.
    """
    text = strict_json.dumps([self._key, name, tasks, depends], sort_keys=True)
    self._key = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = self.folder / f"{name}-{self._key}"
    for other in sorted(self.folder.glob(f"{name}-*")):
      if other != folder:
        report(f"{name}: inputs, options or versions differ from the unfinished run; starting over")
        shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    return Job(name, tasks, run, folder, self._run_id)

  @property
  def published(self) -> Any:
    """The value of the last `publish`, or None."""
    try:
      return json.loads((self.folder / _PUBLISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
      return None

  def publish(self, value: Any) -> None:
    """Notes the result that is about to be moved to its name.

    Args:
      value: A JSON-able value that identifies it. None: forget the result of an earlier run.
    """
    if value is None:
      (self.folder / _PUBLISHED).unlink(missing_ok=True)
    else:
      (self.folder / _PUBLISHED).write_text(strict_json.dumps(value), encoding="utf-8")

  def remove(self) -> None:
    """Deletes the folder. The files that tell the next run that all is done go last."""
    for path in sorted(
      self.folder.iterdir(), key=lambda path: (path.name == _PUBLISHED, path.name == _STATE)
    ):
      if path.is_dir():
        shutil.rmtree(path)
      else:
        path.unlink()
    self.folder.rmdir()
