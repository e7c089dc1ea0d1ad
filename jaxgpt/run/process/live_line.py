"""The line of a run on a terminal: progress, the curve of its loss, throughput, what comes next.

  step 340/600 ━━━━━━━━━━━━━━━━━━━━ ▇▆▅▅▄▄▃▃▂▂▂▂▁ loss 3.7236 …  ETA 3:21  evaluation at 400

A narrow terminal shows less: first the last part goes, then the curve.
"""

import collections
import math
from collections.abc import Mapping, Sequence

from rich import console as rich_console
from rich import progress

_POINTS = 20  # of the curve
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH, _NEXT_WIDTH = 120, 150  # columns of a terminal from which the parts are shown


class LiveLine:
  """The line. Nothing is shown where the console is no terminal."""

  def __init__(
    self, console: rich_console.Console, total: int, start: int, every: Mapping[str, int]
  ):
    """Shows the line.

    Args:
      console: Where.
      total: Steps of the run.
      start: Steps that are done.
      every: {what comes next, in words: steps between two of them, 0 for never}.
    """
    self._total, self._every = total, every
    self._losses: collections.deque[float] = collections.deque(maxlen=_POINTS)
    self._has_curve = console.width >= _CURVE_WIDTH
    self._has_next = console.width >= _NEXT_WIDTH
    self._bar = progress.Progress(
      progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
      progress.BarColumn(20),
      progress.TextColumn("{task.fields[text]}"),
      progress.TextColumn("ETA"),
      progress.TimeRemainingColumn(compact=True),
      progress.TextColumn("{task.fields[next]}"),
      console=console,
      disable=not console.is_terminal,
    )
    text = "compiling …"
    self._task = self._bar.add_task("", total=total, completed=start, text=text, next="")
    self._bar.start()

  @property
  def shown(self) -> bool:
    """Whether the console is a terminal."""
    return not self._bar.disable

  def update(self, step: int, text: str, loss: float | None) -> None:
    """Shows a log line."""
    if loss is not None and math.isfinite(loss):
      self._losses.append(loss)
    if self._has_curve and len(self._losses) > 1:
      text = f"{sparkline(self._losses)} {text}"
    following = next_of(step, self._total, self._every) if self._has_next else ""
    self._bar.update(self._task, completed=step, text=text, next=following)

  def close(self) -> None:
    """Leaves the terminal as it was."""
    self._bar.stop()


def sparkline(values: Sequence[float]) -> str:
  """A curve of one line of characters.

  Example:
    >>> sparkline([4.0, 3.0, 2.0, 2.0])
    '█▄▁▁'
  """
  low, high = min(values), max(values)
  scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
  return "".join(_BARS[int((value - low) * scale)] for value in values)


def next_of(step: int, total: int, every: Mapping[str, int]) -> str:
  """What comes next, such as 'evaluation at 400, save at 500'. The last step is the run's end."""
  found = {
    name: min((step // interval + 1) * interval, total)
    for name, interval in every.items()
    if interval and step < total
  }
  return ", ".join(f"{name} at {at}" for name, at in found.items())
