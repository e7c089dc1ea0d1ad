"""A local queue: worker processes that each train one run after another.

A worker imports the packages once and then answers one line of JSON for each line that it gets:

  queue   {"name": …, "base": …, "overrides": […], "folder": …, "until": N, "log": …}
  worker  {"end": "done"} or {"end": "stopped" | "again" | "diverged" | "failed", "message": …}

Runs are separate processes from this one, so that a crash of a run ends neither the sweep nor the
other runs. The worker gets a signal to save and stop if its input ends, that is, if this process
dies in whatever way.
"""

import collections
import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath

from jaxgpt.analysis.sweep import members as members_lib
from jaxgpt.analysis.sweep import state
from jaxgpt.analysis.sweep.members import Member, Plan
from jaxgpt.run.process import stop_signal
from jaxgpt.storage import strict_json

COMPILED = "compiled"  # folder of compiled programs, for runs that go on
_CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
TRIES = 3  # of a run whose process dies, or meets trouble that may pass
DONE, STOPPED, AGAIN = "done", "stopped", "again"  # besides the kinds of failures


class Job(NamedTuple):
  """A run, and the step to train it to."""

  member: Member
  until: int


class Queue:
  """Trains jobs in several processes.

  Attributes:
    stopped: The signal that stopped it, or None.
  """

  def __init__(
    self,
    plan: Plan,
    workdir: epath.PathLike,
    worker: Sequence[str],
    count: int,
    report: Callable[[Job, str], None],
  ):
    """Starts no process yet.

    Args:
      plan: The sweep.
      workdir: Its folder.
      worker: Command of a worker process.
      count: Number of workers.
      report: Called with each job that ends, and how it did.
    """
    self._plan, self._workdir, self._worker = plan, epath.Path(workdir), worker
    self._count, self._report = count, report
    self._cache = os.path.abspath(self._workdir / COMPILED)
    self._lock = threading.Lock()
    self._waiting: collections.deque[Job] = collections.deque()
    self._processes: dict[int, subprocess.Popen[str]] = {}
    self._errors: list[BaseException] = []
    self._ending = False
    self.stopped: signal.Signals | None = None

  def run(self, jobs: Sequence[Job]) -> None:
    """Trains jobs until all have ended, or a signal stops this process."""
    self._waiting.extend(jobs)
    count = min(self._count, len(jobs))
    threads = [threading.Thread(target=self._serve, args=(i,), daemon=True) for i in range(count)]
    with stop_signal.StopSignal(hangup=True) as stop:
      for thread in threads:
        thread.start()
      for thread in threads:
        while thread.is_alive():
          thread.join(0.2)
          if (stop.received or self._errors) and not self._ending:
            self.stopped = stop.received
            self._end()
    if self._errors:
      raise self._errors[0]

  def close(self) -> None:
    """Ends the worker processes, which have nothing to do."""
    for process in self._processes.values():
      with contextlib.suppress(OSError):
        assert process.stdin is not None
        process.stdin.close()
      process.wait()
    self._processes.clear()

  def _end(self) -> None:
    """Lets the workers save and stop."""
    with self._lock:
      self._ending = True
      self._waiting.clear()
      for process in self._processes.values():
        process.terminate()

  def _serve(self, number: int) -> None:
    """Gives the jobs that wait to one worker, one after another."""
    try:
      while (job := self._next()) is not None:
        self._train(number, job)
    except BaseException as e:  # the main thread raises it
      self._errors.append(e)

  def _next(self) -> Job | None:
    with self._lock:
      return self._waiting.popleft() if self._waiting else None

  def _train(self, number: int, job: Job) -> None:
    """Trains one job, with a new process if it dies."""
    message = ""
    for _ in range(TRIES):
      answer = self._ask(number, job)
      if self._ending and answer["end"] != DONE:
        return
      end, message = answer["end"], answer.get("message", "")
      if end in (AGAIN, STOPPED):
        message = message or "something else than the sweep stopped it"
        continue
      if end in (state.DIVERGED, state.BROKEN):
        state.fail(self._workdir, job.member, state.Failure(end, message))
      break
    else:
      end, message = state.BROKEN, f"{message}, {TRIES} times"
      state.fail(self._workdir, job.member, state.Failure(end, message))
    with self._lock:
      self._report(job, f"{end}: {message}" if message else end)

  def _ask(self, number: int, job: Job) -> dict[str, Any]:
    """A worker's answer to a job."""
    process = self._process(number)
    if process is None:
      return {"end": STOPPED}
    assert process.stdin is not None and process.stdout is not None
    log = self._workdir / members_lib.LOGS / f"{job.member.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    request = {
      "base": self._plan.base,
      "overrides": job.member.overrides,
      "folder": str(members_lib.folder_of(self._workdir, job.member)),
      "until": job.until,
      "log": str(log),
    }
    with contextlib.suppress(OSError, ValueError):  # it has died
      process.stdin.write(strict_json.dumps(request) + "\n")
      process.stdin.flush()
      if line := process.stdout.readline():
        return json.loads(line)
    code = process.wait()
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return {"end": AGAIN, "message": f"its process ended with {how} (see {log})"}

  def _process(self, number: int) -> subprocess.Popen[str] | None:
    """The process of a worker, started if there is none. None if all are to end."""
    with self._lock:
      if self._ending:
        return None
      found = self._processes.get(number)
      if found is None or found.poll() is not None:
        found = subprocess.Popen(
          self._worker,
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          env=_CACHE | {"JAX_COMPILATION_CACHE_DIR": self._cache} | os.environ,
          text=True,
          start_new_session=True,  # a Ctrl-C comes to this process only, which passes it on once
        )
        self._processes[number] = found
      return found
