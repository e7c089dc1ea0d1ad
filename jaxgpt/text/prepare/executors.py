"""Executors of a job's tasks: this process, or datatrove on this machine, on Slurm or on Ray."""

import contextlib
import functools
import importlib.util
import inspect
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from typing import Any

from jaxgpt.errors import UserError, optional
from jaxgpt.storage import malloc
from jaxgpt.text.prepare.jobs import Job, Report
from jaxgpt.text.prepare.options import EXECUTORS
from jaxgpt.text.prepare.run_job import Executor, run_task_or_note
from jaxgpt.text.tokenizers import base

# Arguments of datatrove's executors that `_make` sets.
_OURS = ("self", "pipeline", "tasks", "workers", "logging_dir", "skip_completed", "depends")
_POLL_SECONDS = 5.0


def make(
  kind: str,
  workers: int = 0,
  options: dict[str, Any] | None = None,
  report: Report | None = None,
) -> Executor | None:
  """An executor for `run_job.run`.

  Args:
    kind: 'process': this process, one task after another. 'local': processes on this machine.
      'slurm': array jobs of a Slurm cluster. 'ray': a Ray cluster (RAY_ADDRESS), or this machine if
      there is none. All but 'process' need datatrove. Without it 'local' is 'process'. Slurm and
      Ray need a file system that all machines share.
    workers: Tasks at the same time. 0: one per core, or as many as a cluster takes.
    options: Arguments of datatrove's executor of this kind, such as a Slurm job's 'time' and
      'partition'.
    report: Called with a line of text if 'local' has to do without datatrove.

  Returns:
    executor(job, ranks), or None if this process is to do the work.

  Raises:
    UserError: An unknown kind or option, a missing option, or datatrove is not installed.
  """
  options = dict(options or {})
  if kind not in EXECUTORS:
    raise UserError(f"--executor={kind}: choose one of {', '.join(EXECUTORS)}")
  if workers < 0:
    raise UserError(f"--workers={workers} must be at least 1, or 0 for one per core")
  if kind == "local":
    workers = workers or base.cores()
  if kind == "process" or (kind == "local" and workers == 1):
    _check_options(kind, options, ())
    return None
  if kind == "local" and importlib.util.find_spec("datatrove") is None:
    if report:
      report(
        "datatrove is not installed, so one process does the work; pip install 'jaxgpt[data]' to "
        "use all cores"
      )
    return None
  cls = _executor_class(kind)
  names = [name for name in inspect.signature(cls.__init__).parameters if name not in _OURS]
  _check_options(kind, options, names)
  if kind == "slurm" and (missing := {"time", "partition"} - options.keys()):
    raise UserError(
      f"--executor=slurm needs --executor-option={min(missing)}=…: Slurm requires a time limit "
      "(20:00:00) and a partition"
    )
  launch = {"local": _run_local, "slurm": _run_slurm, "ray": _run_ray}[kind]
  return lambda job, ranks: launch(cls, job, ranks, workers, options)


def _check_options(kind: str, options: dict[str, Any], names: Iterable[str]) -> None:
  for name in options:
    if name not in names:
      raise UserError(
        f"--executor-option={name}=…: the executor {kind} has no such option; choose one of "
        f"{', '.join(names) or 'none'}"
      )


def _executor_class(kind: str) -> Any:
  if kind == "ray":
    optional("ray", "ray", "--executor=ray")
  module = optional(f"datatrove.executor.{kind}", "data", f"--executor={kind}")
  return getattr(module, f"{kind.capitalize()}PipelineExecutor")


def make_step(job: Job, ranks: list[int], threads: int) -> Any:
  """The job as a step of a datatrove pipeline, whose task i is the job's task ranks[i].

  Args:
    job: The job.
    ranks: Tasks to run.
    threads: Number of threads that the process of a task may use.
  """
  optional("loguru", "data", "this executor").logger.disable("datatrove")

  class Step(optional("datatrove.pipeline.base", "data", "this executor").PipelineStep):  # type: ignore[misc] # a class of an optional dependency
    """Runs one task of a job. Documents come and go through files."""

    name, type = job.name, "jaxgpt"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
      del data, world_size
      malloc.give_back()
      os.environ[base.THREADS] = str(threads)
      os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
      with self.track_time():
        run_task_or_note(job, ranks[rank])

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
      return self.run(data, rank, world_size)

    def __reduce__(self) -> tuple[Any, ...]:  # a worker's log is quiet from the start
      return make_step, (job, ranks, threads)

  return Step()


def _make(cls: Any, job: Job, ranks: list[int], **options: Any) -> Any:
  logs = job.folder.parent / "logs" / job.folder.name
  step = make_step(job, ranks, options.get("cpus_per_task", 1))
  return cls([step], tasks=len(ranks), logging_dir=str(logs), skip_completed=False, **options)


def _run_local(cls: Any, job: Job, ranks: list[int], workers: int, options: dict[str, Any]) -> None:
  executor = _make(cls, job, ranks, workers=min(workers, len(ranks)), **options)
  _start_server()
  try:
    with _WatchWorkers(job):
      executor.run()
  except BaseException:  # an interrupt may come before the executor knows the processes it started
    for child in optional("multiprocess", "data", "this executor").active_children():
      child.terminate()
    raise


@functools.cache
def _start_server() -> None:
  """Starts the server that forks the workers of all jobs, with the modules imported once.

  The server ignores Ctrl-C, which a terminal sends to every process: the pool ends the workers, and
  otherwise each of them would print a traceback. Workers of a pool that ends before the server has
  finished its imports would print one too, so this function waits for the imports.
  """
  server = optional("multiprocess.forkserver", "data", "this executor")
  server.set_forkserver_preload(
    ["jaxgpt.text.prepare.tasks.tokenizing", "datatrove.executor.local"]
  )
  previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    server.ensure_running()
  finally:
    signal.signal(signal.SIGINT, previous)
  first = optional("multiprocess.context", "data", "this executor").ForkServerProcess(
    target=os.getpid
  )
  first.start()
  first.join()


class _WorkerLost(BaseException):
  """Raised in the main thread, wherever it waits."""


class _WatchWorkers:
  """Ends the run if a worker is killed. A pool would wait for its task forever.

  A task at work has a folder `.RANK-PID-…`. A thread looks every second for folders whose process
  is gone. A process that has just ended may not have renamed its folder's entry yet, so a folder is
  an orphan only if two looks in a row find it so. Then the thread sends the main thread a signal,
  whose handler raises `_WorkerLost` out of the pool's wait.
  """

  _SIGNAL = signal.SIGUSR1  # not SIGINT, which background jobs of a shell ignore

  def __init__(self, job: Job):
    self._job, self._stop = job, threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> None:
    self._old = signal.signal(self._SIGNAL, self._raise)
    self._thread.start()

  def _raise(self, *_: object) -> None:
    if not self._stop.is_set():
      raise _WorkerLost

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
    self._stop.set()
    self._thread.join()
    signal.signal(self._SIGNAL, self._old)
    return kind is _WorkerLost  # `run_job.run` reports the missing tasks

  def _watch(self) -> None:
    suspects: set[Any] = set()
    while not self._stop.wait(1.0):
      dead = {
        path
        for path in self._job.folder.glob(".0*-*-*")
        if not _is_alive(int(path.name.split("-")[1])) and path.exists()
      }
      if dead & suspects:
        signal.pthread_kill(threading.main_thread().ident or 0, self._SIGNAL)
        return
      suspects = dead


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def _run_ray(cls: Any, job: Job, ranks: list[int], workers: int, options: dict[str, Any]) -> None:
  ray: Any = optional("ray", "ray", "--executor=ray")
  started = not ray.is_initialized()
  if started:
    ray.init(log_to_driver=False, logging_level="ERROR")
  try:
    _make(cls, job, ranks, workers=workers or -1, **options).run()
  finally:
    if started:
      ray.shutdown()


def _run_slurm(cls: Any, job: Job, ranks: list[int], workers: int, options: dict[str, Any]) -> None:
  executor = _make(cls, job, ranks, workers=workers or -1, **options)
  try:
    executor.run()
  except (OSError, subprocess.CalledProcessError) as e:
    raise UserError(
      f"--executor=slurm cannot submit a job with sbatch ({e}); run the command on a machine that "
      "has Slurm's commands, and check --executor-option"
    ) from e
  gone = 0
  while gone < 3 and job.missing() and not job.failures():
    time.sleep(_POLL_SECONDS)
    # The file system may show a task's outputs a while after its job has left the queue.
    gone = 0 if _is_queued(executor.job_id) else gone + 1


def _is_queued(slurm_job: object) -> bool:
  with contextlib.suppress(OSError):
    found = subprocess.run(
      ["squeue", "--noheader", "--jobs", str(slurm_job)], capture_output=True, check=False
    )
    return found.returncode == 0 and bool(found.stdout.strip())
  return False
