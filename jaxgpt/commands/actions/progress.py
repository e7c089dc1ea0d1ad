"""The work at hand on a terminal: counts, rate and time left, for commands that take a while.

  evaluate ━━━━━━━━━━━━━━━━━━━━ 12/79 batches  3.1 batches/s  ETA 0:21

It is on standard error while a command works, and gone at the end. The lines that a command prints
stay above it, and are the same without a terminal, where nothing else is shown.
"""

import sys
import time
from collections.abc import Callable
from typing import Any, Self

from rich import console as rich_console
from rich import progress, text

from jaxgpt.errors import printable
from jaxgpt.text.prepare.monitor import Status


class Pace:
  """The rate of some work since its first count, and the time that is left at that rate.

  Example:
    >>> pace = Pace("rows")
    >>> pace.count(0, 100)
    >>> pace.count(50, 100)  # two seconds later
    >>> pace.describe()
    '50/100 rows  25 rows/s  ETA 0:02'
  """

  def __init__(
    self, unit: str, compiles: bool = False, clock: Callable[[], float] = time.monotonic
  ):
    """Makes it.

    Args:
      unit: What is counted, in the plural.
      compiles: The time of the first count includes a compilation, and is left out of the rate.
      clock: Seconds from any start.
    """
    self._unit, self._compiles, self._clock = unit, compiles, clock
    self._done: float = 0.0
    self._total: int | None = None
    self._first: tuple[float, float] | None = None  # time and count from which the rate follows
    self._last = 0.0

  def count(self, done: float, total: int | None) -> None:
    """Takes a count.

    Args:
      done: Count so far. What was done at the first call took no time.
      total: Count at the end, or None if it is unknown.
    """
    self._done, self._total, self._last = done, total, self._clock()
    if self._first is None:
      self._first = self._last, done
    elif self._compiles and done > self._first[1]:
      self._compiles, self._first = False, (self._last, done)

  @property
  def rate(self) -> float | None:
    """Counts per second, or None as long as it is unknown."""
    if self._first is None:
      return None
    seconds, more = self._last - self._first[0], self._done - self._first[1]
    return more / seconds if seconds > 0 and more > 0 else None

  @property
  def left(self) -> float | None:
    """Seconds that are left, or None. They run down between two counts."""
    if self._total is None or self.rate is None:
      return None
    return max((self._total - self._done) / self.rate - (self._clock() - self._last), 0.0)

  def describe(self, rate: str = "", detail: str = "") -> str:
    """Counts, rate and time left as text.

    Args:
      rate: Text in the place of the rate.
      detail: Text at the end.
    """
    of = "" if self._total is None else f"/{self._total:,}"
    eta = "" if self.left is None else f"ETA {clock(self.left)}"
    parts = (f"{int(self._done):,}{of} {self._unit}", rate or self._rate(), eta, detail)
    return "  ".join(part for part in parts if part)

  def _rate(self) -> str:
    if self._compiles:
      return "compiling …"
    if self.rate is None:
      return ""
    if self.rate < 0.1:
      return f"{1 / self.rate:,.0f} s each"
    digits = 1 if self.rate < 10 else 0
    return f"{self.rate:,.{digits}f} {self._unit}/s"


def clock(seconds: float) -> str:
  """Seconds as '0:07', '12:30' or '1:02:03'."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _PaceColumn(progress.ProgressColumn):
  """The text of a task's pace, up to date at each refresh."""

  def render(self, task: progress.Task) -> text.Text:
    return text.Text(task.fields["pace"].describe(task.fields["rate"], task.fields["detail"]))


class Live:
  """The work at hand on a terminal. Nothing where standard error is none. A context manager.

  Attributes:
    shown: Whether there is a terminal.
  """

  def __init__(
    self,
    unit: str,
    *,
    compiles: bool = False,
    shown: bool = True,
    ticks: bool = True,
    console: rich_console.Console | None = None,
  ):
    """Makes it.

    Args:
      unit: What is counted, in the plural.
      compiles: See `Pace`.
      shown: False: show nothing, as without a terminal.
      ticks: Refresh between two counts too, from a thread of its own.
      console: Where. None: standard error.
    """
    screen = console or rich_console.Console(stderr=True, highlight=False)
    self.shown = shown and screen.is_terminal
    self._make_pace = lambda: Pace(unit, compiles)
    self._bar = progress.Progress(
      progress.TextColumn("{task.description}", markup=False),
      progress.BarColumn(20),
      _PaceColumn(),
      console=screen,
      auto_refresh=ticks,
      transient=True,
      redirect_stdout=sys.stdout.isatty(),
      disable=not self.shown,
    )
    self._task: progress.TaskID | None = None
    self._name, self._done, self._pace = "", 0.0, self._make_pace()

  def __enter__(self) -> Self:
    self._bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.stop()

  def count(
    self, done: float, total: int | None, name: str = "", rate: str = "", detail: str = ""
  ) -> None:
    """Shows a count.

    Args:
      done: Count so far.
      total: Count at the end, or None if it is unknown.
      name: Name of the work. Another one than before, or a lower count, begins other work.
      rate: Text in the place of the rate.
      detail: Text at the end.
    """
    if not self.shown:
      return
    fields: dict[str, Any] = {"rate": rate, "detail": printable(detail)}
    if begins := self._task is None or name != self._name or done < self._done:
      self.clear()
      self._name, self._pace = name, self._make_pace()
    self._done = done
    self._pace.count(done, total)
    if begins or self._task is None:
      self._task = self._bar.add_task(printable(name), total=total, pace=self._pace, **fields)
    self._bar.update(self._task, completed=done, total=total, **fields)
    self._bar.refresh()

  def clear(self) -> None:
    """Takes the work off the terminal."""
    if self._task is not None:
      self._bar.remove_task(self._task)
      self._bar.refresh()
      self._task = None


class OfPreparation(Live):
  """Lines of `jaxgpt data` on standard output, and below them the job at work.

  Call it with a line.

  Attributes:
    show: Takes a `Status`, or None at the end of a job. It is None without a terminal.
  """

  def __init__(self, **options: Any):
    # A thread that draws would be in the middle of something when a worker is forked.
    super().__init__("tasks", ticks=False, **options)
    self.show: Callable[[Status | None], None] | None = self._show if self.shown else None

  def __call__(self, line: str) -> None:
    print(printable(line), flush=True)

  def _show(self, status: Status | None) -> None:
    if status is None:
      self.clear()
      return
    rate = f"{status.documents:,} documents  {status.rate / 1e6:.1f} MB/s"
    self.count(status.done, status.tasks, status.job, rate)


class OfChunks:
  """Shows the rows of a job that works in chunks: those before the chunk, and a share of it.

  Attributes:
    total: Rows in all, or None if they are not known.
  """

  def __init__(self, live: Live):
    """Args: live: Where to show."""
    self._live = live
    self.total: int | None = None
    self._before = self._size = 0

  def begin(self, before: int, size: int) -> None:
    """A chunk begins. Args: before: Rows before it. size: Its rows."""
    self._before, self._size = before, size
    self.share(0.0)

  def share(self, share: float) -> None:
    """A share of the chunk is done, from 0 to 1."""
    self._live.count(self._before + min(share, 1.0) * self._size, self.total, "predict")
