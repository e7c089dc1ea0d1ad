"""Runs the unfinished tasks of a job, in this process or on an executor."""

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import time
import traceback
from collections.abc import Callable

from jaxgpt.errors import UserError
from jaxgpt.storage import strict_json
from jaxgpt.text.prepare.jobs import DONE, Account, Job, Report
from jaxgpt.text.prepare.monitor import PROGRESS, Monitor, Progress

Executor = Callable[[Job, list[int]], None]

_EXPECTED = (UserError, OSError)  # failures of a task that are reported without a traceback


def run(job: Job, executor: Executor | None, report: Report) -> list[Account]:
  """Runs the tasks of a job that are not done.

  Args:
    job: The job.
    executor: Called as executor(job, ranks) if more than one task is left. It returns when no more
      of them will be done. None: all tasks run in this process.
    report: Called with a line of text at the end and every 10 s. See `Monitor`.

  Returns:
    The accounts of all tasks by rank.

  Raises:
    UserError: A task raised one, or tasks ended without a result.
    OSError: A task raised one.
    RuntimeError: A task failed otherwise in another process.
  """
  missing = job.missing()
  if 0 < len(missing) < job.tasks:
    report(f"{job.name}: {job.tasks - len(missing)} of {job.tasks} tasks are done already")
  for left in job.folder.glob(".*"):  # by an earlier run
    if left.is_dir():
      shutil.rmtree(left, ignore_errors=True)
    else:
      left.unlink(missing_ok=True)
  start = time.monotonic()
  with Monitor(job, report):
    if executor is None or len(missing) < 2:
      for rank in missing:
        run_task(job, rank)
    else:
      executor(job, missing)
  _raise_failures(job)
  accounts = _accounts(job)
  if missing:
    report(f"{job.name}: {job.tasks} task{'s' * (job.tasks > 1)}, {time.monotonic() - start:.1f} s")
  return accounts


def _accounts(job: Job) -> list[Account]:
  found = [job.account(rank) for rank in range(job.tasks)]
  accounts = [account for account in found if account is not None]
  if len(accounts) < job.tasks:
    raise UserError(
      f"{job.tasks - len(accounts)} of {job.tasks} tasks of the job {job.name} ended without a "
      f"result (the first: {found.index(None)}). Something killed their processes, often a lack "
      "of memory (lower --workers) or of disk space. Their logs are in "
      f"{job.folder.parent}/logs; the same command continues"
    )
  return accounts


def run_task(job: Job, rank: int) -> None:
  """Runs one task, unless it is done already."""
  if job.account(rank) is not None:
    return
  final = job.task_folder(rank)
  folder = job.folder / f".{rank:05d}-{os.getpid()}-{secrets.token_hex(4)}"
  folder.mkdir()
  try:
    progress = Progress(folder)
    account = _run_in(folder, job, rank, progress)
    (folder / PROGRESS).unlink(missing_ok=True)
    files = {
      path.relative_to(folder).as_posix(): path.stat().st_size
      for path in sorted(folder.rglob("*"))
      if path.is_file()
    }
    (folder / DONE).write_text(
      strict_json.dumps({"account": account, "counts": progress.counts, "files": files}),
      encoding="utf-8",
    )
    if job.account(rank) is None:  # else a process that outlived its run was faster
      shutil.rmtree(final, ignore_errors=True)
      with contextlib.suppress(FileExistsError, OSError):
        folder.rename(final)
      assert job.account(rank) is not None, f"{folder} could not become {final}"
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _run_in(folder: pathlib.Path, job: Job, rank: int, progress: Progress) -> Account:
  """The account of a task. A file that cannot be written is an OSError, whatever wrote it."""
  try:
    return job.run(rank, folder, progress)
  except RuntimeError as e:  # array_record raises it, for instance if the disk is full
    if str(folder) in str(e):
      raise OSError(str(e)) from e
    raise


def run_task_or_note(job: Job, rank: int) -> None:
  """`run_task` for a process whose exceptions get lost: writes a failure to a file.

  After a failure, tasks that have not begun are skipped, so that the run ends soon.
  """
  if job.failures():
    return
  try:
    run_task(job, rank)
  except Exception as e:
    kind = next((cls.__name__ for cls in _EXPECTED if isinstance(e, cls)), None)
    failure = {
      "kind": kind,
      "message": getattr(e, "strerror", None) or str(e),
      "traceback": traceback.format_exc(),
    }
    path = job.folder / f".failed-{job.run_id}-{rank:05d}"
    with contextlib.suppress(FileNotFoundError):  # a later run has deleted the job
      path.write_text(strict_json.dumps(failure), encoding="utf-8")


def _raise_failures(job: Job) -> None:
  for path in job.failures():
    failure = json.loads(path.read_text(encoding="utf-8"))
    for cls in _EXPECTED:
      if failure["kind"] == cls.__name__:
        raise cls(failure["message"])
    raise RuntimeError(f"task {path.name[-5:]} of job {job.name} failed:\n{failure['traceback']}")
