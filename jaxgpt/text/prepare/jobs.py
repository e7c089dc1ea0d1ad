"""Stages of tasks that may be killed at any moment and go on where they were.

    WORK/state.json                 marks a folder as ours
    WORK/published.json             what came out has its name: only this folder is left over
    WORK/NAME-KEY/00012/            the outputs of task 12 of a stage, renamed into place whole
    WORK/NAME-KEY/00012/done.json   its account and the sizes of its files, written last
    WORK/NAME-KEY/.00012-PID-…/     a task at work, or what a killed one left

A stage's key is a hash of all that its outputs depend on, the stages before it among them. So a
finished task is valid for as long as its folder is there, and a process that outlives its run
writes nowhere but into folders of its own key.
"""

import contextlib
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
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from jaxgpt.errors import UserError

_STATE = "state.json"
_PUBLISHED = "published.json"
_DONE = "done.json"
_PROGRESS = "progress"
_REPORT_SECONDS = 10.0
_SHOW_SECONDS = 1.0
_PROGRESS_SECONDS = 2.0


_TOLD = (UserError, OSError)  # failures of a task that are told without a traceback
_LOCK_TRIES = 25  # of 0.2 s
_locks = set()  # file descriptors of the locks that this process holds


def _leave_run():
  """In a process that was forked from a run: it holds no lock, and doesn't outlive the run.

  datatrove's executor forks one that would wait for ever where its parent was killed.
  """
  if _locks and sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
  while _locks:
    os.close(_locks.pop())


os.register_at_fork(after_in_child=_leave_run)


@dataclasses.dataclass(frozen=True)
class Stage:
  """What is done, task by task, and where its outputs are.

  Attributes:
    name: a word, for folders and reports.
    tasks: how many; a property of the inputs, never of the machines.
    run: run(rank, folder, progress) writes the outputs of one task into an empty folder and
      returns its account, a JSON-able dict. It can be pickled, and depends on nothing but what
      the key covers. `progress(documents, bytes)` is to be called now and then.
    folder: where the outputs are, in folders named by `task_folder`.
    run_id: of the run that works on it; a process that outlived another run has another.
  """

  name: str
  tasks: int
  run: Callable
  folder: pathlib.Path
  run_id: str

  def task_folder(self, rank):
    return self.folder / f"{rank:05d}"

  def done(self, rank):
    """What the finished task left: {account, counts, files}, or None."""
    folder = self.task_folder(rank)
    try:
      done = json.loads((folder / _DONE).read_text(encoding="utf-8"))
      if done.keys() == {"account", "counts", "files"} and all(
        (folder / name).stat().st_size == size for name, size in done["files"].items()
      ):
        return done
    except (OSError, ValueError, AttributeError):
      pass
    return None

  def account(self, rank):
    """What the finished task returned, or None."""
    done = self.done(rank)
    return done and done["account"]

  def failures(self):
    """Files of the tasks that failed in this run."""
    return sorted(self.folder.glob(f".failed-{self.run_id}-*"))

  def missing(self):
    """Ranks of the tasks that are not done."""
    return [rank for rank in range(self.tasks) if self.account(rank) is None]


def _lock(descriptor):
  """Locks a file; children of a run that was just killed hold it for a moment yet."""
  for left in reversed(range(_LOCK_TRIES)):
    try:
      return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      if not left:
        raise
      time.sleep(0.2)


class Work:
  """The folder of a run's unfinished work, locked against other runs. A context manager."""

  def __init__(self, folder, description):
    """Makes the folder, or takes up the one that an interrupted run left.

    Args:
      folder: a pathlib.Path whose parent exists.
      description: a JSON-able dict for whoever looks into the folder.

    Raises:
      UserError: the folder is something else, or another run is at work in it.
    """
    self.folder = folder
    self.found = folder.exists() and any(folder.iterdir())
    if self.found and not any((folder / name).is_file() for name in (_STATE, _PUBLISHED)):
      raise UserError(
        f"{folder} is in the way: it is where unfinished work goes, and no run of "
        "jaxgpt left it; move it, or name another --out"
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
        f"another run is at work in {folder}; wait for it, or name another --out"
      ) from e
    _locks.add(self._lock)
    (folder / _STATE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    self._key, self._run_id = "", secrets.token_hex(4)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    _locks.discard(self._lock)
    os.close(self._lock)

  def stage(self, name, tasks, run, depends, report):
    """The next stage; its key covers `depends`, a JSON-able value, and all stages before it.

    Outputs of a stage of this name with another key are deleted: their inputs have changed.
    """
    text = json.dumps([self._key, name, tasks, depends], sort_keys=True)
    self._key = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = self.folder / f"{name}-{self._key}"
    for other in sorted(self.folder.glob(f"{name}-*")):
      if other != folder:
        report(f"{name}: inputs, options or versions are not those of the unfinished run; anew")
        shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    return Stage(name, tasks, run, folder, self._run_id)

  @property
  def published(self):
    """What the last `publish` was told, or None."""
    try:
      return json.loads((self.folder / _PUBLISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
      return None

  def publish(self, told):
    """Notes what is about to get its name, a JSON-able value; None: it is another run's."""
    if told is None:
      (self.folder / _PUBLISHED).unlink(missing_ok=True)
    else:
      (self.folder / _PUBLISHED).write_text(json.dumps(told), encoding="utf-8")

  def remove(self):
    """Deletes everything, what tells a rerun that all is done last."""
    for path in sorted(
      self.folder.iterdir(), key=lambda path: (path.name == _PUBLISHED, path.name == _STATE)
    ):
      if path.is_dir():
        shutil.rmtree(path)
      else:
        path.unlink()
    self.folder.rmdir()


class Progress:
  """Counts of a task at work, in a file that `Monitor` reads: it may be on another machine."""

  def __init__(self, folder):
    self._path, self._said = folder / _PROGRESS, time.monotonic()
    self.counts = [0, 0]  # documents, bytes

  def __call__(self, documents, num_bytes):
    self.counts = [self.counts[0] + documents, self.counts[1] + num_bytes]
    if time.monotonic() - self._said > _PROGRESS_SECONDS:
      self._said = time.monotonic()
      self._path.write_text("{} {}".format(*self.counts), encoding="utf-8")


def run_task(stage, rank):
  """Runs one task, unless it is done already."""
  if stage.account(rank) is not None:
    return
  final = stage.task_folder(rank)
  folder = stage.folder / f".{rank:05d}-{os.getpid()}-{secrets.token_hex(4)}"
  folder.mkdir()
  try:
    progress = Progress(folder)
    account = _run_in(folder, stage, rank, progress)
    (folder / _PROGRESS).unlink(missing_ok=True)
    files = {
      path.relative_to(folder).as_posix(): path.stat().st_size
      for path in sorted(folder.rglob("*"))
      if path.is_file()
    }
    (folder / _DONE).write_text(
      json.dumps({"account": account, "counts": progress.counts, "files": files}), encoding="utf-8"
    )
    if stage.account(rank) is None:  # else a process that outlived its run was faster
      shutil.rmtree(final, ignore_errors=True)
      with contextlib.suppress(FileExistsError, OSError):
        folder.rename(final)
      assert stage.account(rank) is not None, f"{folder} could not become {final}"
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _run_in(folder, stage, rank, progress):
  """The account of a task; a file that can't be written is an OSError, whoever writes it."""
  try:
    return stage.run(rank, folder, progress)
  except RuntimeError as e:  # array_record's, such as of a full disk: it names the file
    if str(folder) in str(e):
      raise OSError(str(e)) from e
    raise


def run_task_or_note(stage, rank):
  """`run_task` for a process whose exceptions nobody sees: a failure becomes a file.

  After a failure the tasks that have not begun are left undone, so that the run ends soon.
  """
  if stage.failures():
    return
  try:
    run_task(stage, rank)
  except Exception as e:
    kind = next((cls.__name__ for cls in _TOLD if isinstance(e, cls)), None)
    failure = {
      "kind": kind,
      "message": getattr(e, "strerror", None) or str(e),
      "traceback": traceback.format_exc(),
    }
    path = stage.folder / f".failed-{stage.run_id}-{rank:05d}"
    with contextlib.suppress(FileNotFoundError):  # a later run has deleted the stage
      path.write_text(json.dumps(failure), encoding="utf-8")


def run(stage, executor, report):
  """Runs the tasks of a stage that are not done.

  Args:
    stage: a Stage.
    executor: called as executor(stage, ranks) where more than one task is left, and returns when
      no more of them is going to be done; or None, to run all of them in this process.
    report: called with a line of text, every 10 s too, unless it has a method `show`: see `Monitor`.

  Returns:
    The accounts of all tasks, in the order of their ranks.

  Raises:
    UserError, OSError: what a task raised.
    RuntimeError: a task failed otherwise, in another process.
  """
  missing = stage.missing()
  if 0 < len(missing) < stage.tasks:
    report(f"{stage.name}: {stage.tasks - len(missing)} of {stage.tasks} tasks are done already")
  for left in stage.folder.glob(".*"):
    if left.is_dir():
      shutil.rmtree(left, ignore_errors=True)
    else:
      left.unlink(missing_ok=True)
  start = time.monotonic()
  with Monitor(stage, report):
    if executor is None or len(missing) < 2:
      for rank in missing:
        run_task(stage, rank)
    else:
      executor(stage, missing)
  _raise_failures(stage)
  accounts = [stage.account(rank) for rank in range(stage.tasks)]
  lost = [rank for rank, account in enumerate(accounts) if account is None]
  if lost:
    raise UserError(
      f"{len(lost)} of {stage.tasks} tasks of the stage {stage.name} ended without a "
      f"result (the first: {lost[0]}); their processes were ended from outside, "
      f"often for want of memory (give fewer --workers) or of room on the disk. "
      f"Their logs are in "
      f"{stage.folder.parent}/logs; the same command goes on"
    )
  if missing:
    report(
      f"{stage.name}: {stage.tasks} task{'s' * (stage.tasks > 1)}, {time.monotonic() - start:.1f} s"
    )
  return accounts


def _raise_failures(stage):
  for path in stage.failures():
    failure = json.loads(path.read_text(encoding="utf-8"))
    for cls in _TOLD:
      if failure["kind"] == cls.__name__:
        raise cls(failure["message"])
    raise RuntimeError(
      f"task {path.name[-5:]} of stage {stage.name} failed:\n{failure['traceback']}"
    )


class Status(NamedTuple):
  """How far a stage is: its name, tasks that are done of how many, documents that were gone
  through, and bytes a second since this run began with it."""

  stage: str
  done: int
  tasks: int
  documents: int
  rate: float


class Monitor:
  """Says how far a stage is, from the files of its tasks. A context manager.

  Every second to `report.show` where there is such a method, else a line every 10 s.
  """

  def __init__(self, stage, report):
    self._stage, self._report = stage, report
    self._show = getattr(report, "show", None)
    self._left = set(range(stage.tasks))
    self._documents = self._bytes = 0  # of finished tasks
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self):
    self._thread.start()

  def __exit__(self, *_):
    self._stop.set()
    self._thread.join()

  def _watch(self):
    start = time.monotonic()
    self._look()
    before = self._bytes
    while not self._stop.wait(_SHOW_SECONDS if self._show else _REPORT_SECONDS):
      documents, num_bytes = self._look()
      done, seconds = self._stage.tasks - len(self._left), time.monotonic() - start
      if self._show:
        self._show(
          Status(
            self._stage.name,
            done,
            self._stage.tasks,
            self._documents + documents,
            (self._bytes + num_bytes - before) / seconds,
          )
        )
        continue
      line = f"{self._stage.name}: {done} of {self._stage.tasks} tasks done"
      if documents:
        line += f", at work on {documents:,} documents, {num_bytes / 1e6:,.0f} MB"
      self._report(f"{line} ({seconds:.0f} s)")
    if self._show:
      self._show(None)

  def _look(self):
    """(documents, bytes) of the tasks at work; those of the finished ones are added up."""
    documents = num_bytes = 0
    for path in self._stage.folder.glob(f".*/{_PROGRESS}"):
      with contextlib.suppress(OSError, ValueError):  # it may be gone, or half written
        more, size = map(int, path.read_text(encoding="utf-8").split())
        documents, num_bytes = documents + more, num_bytes + size
    for rank in sorted(self._left):
      if (done := self._stage.done(rank)) is not None:
        self._left.remove(rank)
        self._documents += done["counts"][0]
        self._bytes += done["counts"][1]
    return documents, num_bytes
