"""What runs the tasks of a stage: this process, or datatrove on this machine, Slurm or Ray."""

import contextlib
import functools
import importlib.util
import inspect
import os
import signal
import subprocess
import threading
import time

from jaxgpt.errors import UserError, optional
from jaxgpt.storage import malloc
from jaxgpt.text.prepare import jobs
from jaxgpt.text.prepare.options import EXECUTORS
from jaxgpt.text.tokenizers import base

_OURS = ("self", "pipeline", "tasks", "workers", "logging_dir", "skip_completed", "depends")
_POLL_SECONDS = 5.0


def make(kind, workers=0, options=None, report=None):
  """A function that runs tasks, for `stages.run`.

  Args:
    kind: 'process': this process, one task after another; 'local': processes on this machine;
      'slurm': array jobs of a Slurm cluster; 'ray': a Ray cluster (RAY_ADDRESS), or this machine
      where there is none. All but the first need datatrove; without it, 'local' is 'process'.
      Slurm and Ray need a file system that all machines share.
    workers: tasks that run at the same time; 0: one a core, or as many as a cluster takes.
    options: {name: value} for datatrove's executor of this kind, such as a Slurm job's 'time'
      and 'partition'.
    report: called with a line of text where 'local' has to do without datatrove.

  Returns:
    executor(stage, ranks), or None where this process is to do the work.

  Raises:
    UserError: an unknown kind or option, a missing one, or no datatrove.
  """
  options = dict(options or {})
  if kind not in EXECUTORS:
    raise UserError(f"--executor={kind}: choose one of {', '.join(EXECUTORS)}")
  if workers < 0:
    raise UserError(f"--workers={workers} must be at least 1, or 0 for one a core")
  if kind == "local":
    workers = workers or base.cores()
  if kind == "process" or (kind == "local" and workers == 1):
    _check_options(kind, options, ())
    return None
  if kind == "local" and importlib.util.find_spec("datatrove") is None:
    if report:
      report(
        "datatrove is not installed, so one process does the work; "
        "pip install 'jaxgpt[data]' uses all cores"
      )
    return None
  cls = _executor_class(kind)
  names = [name for name in inspect.signature(cls.__init__).parameters if name not in _OURS]
  _check_options(kind, options, names)
  if kind == "slurm" and (missing := {"time", "partition"} - options.keys()):
    raise UserError(
      f"--executor=slurm needs --executor-option={min(missing)}=…: Slurm wants a "
      "time limit (20:00:00) and a partition"
    )
  launch = {"local": _run_local, "slurm": _run_slurm, "ray": _run_ray}[kind]
  return lambda stage, ranks: launch(cls, stage, ranks, workers, options)


def _check_options(kind, options, names):
  for name in options:
    if name not in names:
      raise UserError(
        f"--executor-option={name}=…: the executor {kind} has no such option; "
        f"it has {', '.join(names) or 'none'}"
      )


def _executor_class(kind):
  if kind == "ray":
    optional("ray", "ray", "--executor=ray")
  module = optional(f"datatrove.executor.{kind}", "data", f"--executor={kind}")
  return getattr(module, f"{kind.capitalize()}PipelineExecutor")


def make_step(stage, ranks, threads):
  """The stage as a step of a datatrove pipeline, whose task i is our task ranks[i].

  Its process has so many threads to itself.
  """
  optional("loguru", "data", "this executor").logger.disable("datatrove")

  class Step(optional("datatrove.pipeline.base", "data", "this executor").PipelineStep):
    """Runs one task of a stage; documents come and go through files."""

    name, type = stage.name, "jaxgpt"

    def run(self, data, rank=0, world_size=1):
      del data, world_size
      malloc.give_back()
      os.environ[base.THREADS] = str(threads)
      os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
      with self.track_time():
        jobs.run_task_or_note(stage, ranks[rank])

    def __call__(self, data=None, rank=0, world_size=1):
      return self.run(data, rank, world_size)

    def __reduce__(self):  # so that a worker's log is quiet from the start
      return make_step, (stage, ranks, threads)

  return Step()


def _make(cls, stage, ranks, **options):
  logs = stage.folder.parent / "logs" / stage.folder.name
  step = make_step(stage, ranks, options.get("cpus_per_task", 1))
  return cls([step], tasks=len(ranks), logging_dir=str(logs), skip_completed=False, **options)


def _run_local(cls, stage, ranks, workers, options):
  executor = _make(cls, stage, ranks, workers=min(workers, len(ranks)), **options)
  _start_server()
  try:
    with _WatchWorkers(stage):
      executor.run()
  except BaseException:  # an interrupt may come before the executor knows of what it has started
    for child in optional("multiprocess", "data", "this executor").active_children():
      child.terminate()
    raise


@functools.cache
def _start_server():
  """One import for all stages: the server lives on, and its children are ready at once.

  They don't hear Ctrl-C, which a terminal sends to all: the pool ends them, and each would print
  where it was. So would those of a pool that ends before the server has done its imports, which is
  why these are waited for.
  """
  server = optional("multiprocess.forkserver", "data", "this executor")
  server.set_forkserver_preload(["jaxgpt.text.prepare.tasks", "datatrove.executor.local"])
  heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    server.ensure_running()
  finally:
    signal.signal(signal.SIGINT, heard)
  first = optional("multiprocess.context", "data", "this executor").ForkServerProcess(
    target=os.getpid
  )
  first.start()
  first.join()


class _WorkerLost(BaseException):
  """Raised in the main thread, out of whatever it waits for."""


class _WatchWorkers:
  """Ends the run where a worker was killed: a pool would wait for its task for ever."""

  _SIGNAL = signal.SIGUSR1  # not SIGINT, which a shell's background jobs ignore

  def __init__(self, stage):
    self._stage, self._stop = stage, threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self):
    self._old = signal.signal(self._SIGNAL, self._raise)
    self._thread.start()

  def _raise(self, *_):
    if not self._stop.is_set():
      raise _WorkerLost

  def __exit__(self, kind, *_):
    self._stop.set()
    self._thread.join()
    signal.signal(self._SIGNAL, self._old)
    return kind is _WorkerLost  # `stages.run` says what is missing

  def _watch(self):
    suspects = set()
    while not self._stop.wait(1.0):
      dead = {
        path
        for path in self._stage.folder.glob(".0*-*-*")
        if not _is_alive(int(path.name.split("-")[1])) and path.exists()
      }
      if dead & suspects:
        signal.pthread_kill(threading.main_thread().ident, self._SIGNAL)
        return
      suspects = dead


def _is_alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def _run_ray(cls, stage, ranks, workers, options):
  ray = optional("ray", "ray", "--executor=ray")
  started = not ray.is_initialized()
  if started:
    ray.init(log_to_driver=False, logging_level="ERROR")
  try:
    _make(cls, stage, ranks, workers=workers or -1, **options).run()
  finally:
    if started:
      ray.shutdown()


def _run_slurm(cls, stage, ranks, workers, options):
  executor = _make(cls, stage, ranks, workers=workers or -1, **options)
  try:
    executor.run()
  except (OSError, subprocess.CalledProcessError) as e:
    raise UserError(
      f"--executor=slurm can't submit a job with sbatch ({e}); run this where "
      "Slurm's commands are, and check --executor-option"
    ) from e
  gone = 0
  while gone < 3 and stage.missing() and not stage.failures():
    time.sleep(_POLL_SECONDS)
    # The file system may show a task's outputs a while after its job has left the queue.
    gone = 0 if _is_queued(executor.job_id) else gone + 1


def _is_queued(job):
  with contextlib.suppress(OSError):
    found = subprocess.run(
      ["squeue", "--noheader", "--jobs", str(job)], capture_output=True, check=False
    )
    return found.returncode == 0 and bool(found.stdout.strip())
  return False
