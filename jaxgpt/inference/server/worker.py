"""The one thread that runs the engine, and the queue in front of it.

The event loop submits jobs and receives their pieces. The engine's thread takes what was submitted
between two steps, so a slow step delays nobody's network traffic and no client delays a step.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from jaxgpt.errors import UserError, first_line
from jaxgpt.inference.engine.requests import ERROR, Piece, Request, Stats

_MOST_FAILURES = 3  # steps of the engine in a row
_log = logging.getLogger(__name__)


class Engine(Protocol):
  """The decoding engine, `jaxgpt.inference.engine.engine.Engine`, used from one thread."""

  def add(self, request: Request) -> int:
    """Queues a request and returns its number."""
    ...

  def cancel(self, number: int) -> None:
    """Ends a request."""
    ...

  def step(self) -> list[Piece]:
    """Begins the next tokens of the requests, and returns what was read of those before."""
    ...

  @property
  def busy(self) -> bool:
    """Whether a request is queued or running."""
    ...

  def stats(self) -> Stats:
    """The engine's state."""
    ...


class Job:
  """A request on its way through the engine. Belongs to the event loop.

  Attributes:
    request: The request.
    deliver: Called in the event loop with each of its pieces.
    ended: Whether it has ended or was cancelled: no piece comes any more.
  """

  def __init__(self, request: Request, deliver: Callable[[Piece], None]):
    self.request, self.deliver = request, deliver
    self.ended = False


class Full(Exception):
  """The queue is full. `seconds` is about the time until a place is free."""

  def __init__(self, seconds: int):
    super().__init__()
    self.seconds = seconds


class Worker:
  """Runs an engine in a thread of its own.

  Attributes:
    capacity: Most jobs that run or wait.
    jobs: Number of jobs that run or wait.
    failed: The engine cannot go on.
    stats: The engine's state after its last step.
  """

  def __init__(
    self,
    engine: Engine,
    capacity: int,
  ):
    """Prepares the worker.

    Args:
      engine: The engine.
      capacity: Most jobs that run or wait.
    """
    self.capacity, self.jobs, self.failed = capacity, 0, False
    self.stats = engine.stats()
    self._engine = engine
    self._on_failure: Callable[[], None] = lambda: None
    self._loop: asyncio.AbstractEventLoop | None = None
    # What the event loop asks of the thread: ('add' or 'cancel', job), or None to stop.
    self._asked: queue.SimpleQueue[tuple[str, Job] | None] = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._of_number: dict[int, Job] = {}  # of the engine's thread
    self._numbers: dict[Job, int] = {}
    self._finished, self._busy_since = 0, time.monotonic()  # jobs since the queue was empty

  def start(self, on_failure: Callable[[], None]) -> None:
    """Starts the thread. Call it in the event loop.

    Args:
      on_failure: Called in the event loop once the engine cannot go on.
    """
    self._on_failure = on_failure
    self._loop = asyncio.get_running_loop()
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread after its current step."""
    self._asked.put(None)
    self._thread.join()

  def submit(self, jobs: Sequence[Job]) -> None:
    """Queues jobs, all or none.

    Raises:
      Full: The queue has no room for all.
    """
    self.check_room(len(jobs))
    if not self.jobs:
      self._finished, self._busy_since = 0, time.monotonic()
    self.jobs += len(jobs)
    for job in jobs:
      self._asked.put(("add", job))

  def check_room(self, places: int = 1) -> None:
    """Raises `Full` if the queue has no room for so many jobs."""
    if self.jobs + places > self.capacity:
      # By the rate at which jobs have ended since the queue was empty.
      seconds = (time.monotonic() - self._busy_since) / max(self._finished, 1)
      raise Full(max(1, min(60, round(places * seconds))))

  def cancel(self, job: Job) -> None:
    """Ends a job. Its place is free at once, its row in the engine after the next step."""
    if not job.ended:
      self._end(job)
      self._asked.put(("cancel", job))

  def _end(self, job: Job) -> None:
    job.ended = True
    self.jobs -= 1
    self._finished += 1

  # Below here: the engine's thread.

  def _run(self) -> None:
    failures = 0
    while failures < _MOST_FAILURES:
      if not self._take():
        return
      try:
        if self._engine.busy:
          pieces = self._engine.step()
          self._post(pieces)
          if any(piece.tokens for piece in pieces):  # a step may begin what fails at the read
            failures = 0
        self.stats = self._engine.stats()
      except Exception as e:  # a bug, or the device is out of memory
        failures += 1
        _log.exception("a step of the engine failed")
        self._fail_all(f"a step of the engine failed: {first_line(e, 200)}")
    self.failed = True
    self._call(self._on_failure)
    while (asked := self._asked.get()) is not None:
      self._refuse(asked[1], "the engine has stopped")

  def _take(self) -> bool:
    """Does what was asked, and waits if there is nothing else to do. False: stop."""
    try:
      while True:
        asked = self._asked.get(block=not self._engine.busy)
        if asked is None:
          return False
        what, job = asked
        try:
          self._add(job) if what == "add" else self._cancel(job)
        except UserError as e:
          self._refuse(job, str(e))
        except Exception as e:
          _log.exception("the engine failed to %s a request", what)
          self._refuse(job, f"the engine failed: {first_line(e, 200)}")
        if self._asked.empty():
          return True
    except queue.Empty:
      return True

  def _add(self, job: Job) -> None:
    if not job.ended:  # else it was cancelled before it came here
      number = self._engine.add(job.request)
      self._of_number[number], self._numbers[job] = job, number

  def _cancel(self, job: Job) -> None:
    if job in self._numbers:  # else it has ended meanwhile
      number = self._numbers.pop(job)
      del self._of_number[number]
      self._engine.cancel(number)

  def _refuse(self, job: Job, why: str) -> None:
    self._send([(job, Piece(-1, "", (), f"{ERROR}{why}"))])

  def _post(self, pieces: Sequence[Piece]) -> None:
    found = []
    for piece in pieces:
      job = self._of_number.get(piece.request)
      if job is None:  # cancelled
        continue
      if piece.finish:
        del self._of_number[piece.request], self._numbers[job]
      found.append((job, piece))
    self._send(found)

  def _fail_all(self, why: str) -> None:
    failed = list(self._of_number.items())
    self._of_number.clear()
    self._numbers.clear()
    for number, _ in failed:
      try:
        self._engine.cancel(number)
      except Exception:  # the engine's state is broken: the next step tells
        _log.exception("the engine cannot cancel a request")
    self._send([(job, Piece(number, "", (), f"{ERROR}{why}")) for number, job in failed])

  def _send(self, pieces: Sequence[tuple[Job, Piece]]) -> None:
    if pieces:
      self._call(self._deliver, pieces)

  def _call(self, function: Callable[..., None], *args: object) -> None:
    assert self._loop is not None
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for an answer
      self._loop.call_soon_threadsafe(function, *args)

  def _deliver(self, pieces: Sequence[tuple[Job, Piece]]) -> None:
    """Hands out pieces, in the event loop."""
    for job, piece in pieces:
      if job.ended:
        continue
      if piece.finish:
        self._end(job)
      job.deliver(piece)
