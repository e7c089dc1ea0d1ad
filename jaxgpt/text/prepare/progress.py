"""Terminal output of a preparation: lines, and below them a bar for the job at work."""

import sys
from collections.abc import Callable
from typing import Self

from rich import console, progress

from jaxgpt.errors import printable
from jaxgpt.text.prepare.monitor import Status


class Terminal:
  """Prints lines to stdout, and shows the job at work on stderr if that is a terminal.

  A context manager. Call it with a line.

  Attributes:
    show: Takes a `Status`, or None at the end of a job. It is None without a terminal.
  """

  def __init__(self) -> None:
    screen = console.Console(stderr=True, highlight=False)
    self._bar = progress.Progress(
      progress.TextColumn("{task.description}"),
      progress.BarColumn(20),
      progress.TextColumn("{task.completed}/{task.total} tasks  {task.fields[text]}  ETA"),
      progress.TimeRemainingColumn(compact=True),
      console=screen,
      auto_refresh=False,
      transient=True,
      redirect_stdout=sys.stdout.isatty(),
    )
    self._task: progress.TaskID | None = None
    self.show: Callable[[Status | None], None] | None = self._show if screen.is_terminal else None

  def __enter__(self) -> Self:
    if self.show:
      self._bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self.show:
      self._bar.stop()

  def __call__(self, line: str) -> None:
    print(printable(line), flush=True)

  def _show(self, status: Status | None) -> None:
    if status is None:
      if self._task is not None:
        self._bar.remove_task(self._task)
        self._task = None
    else:
      text = f"{status.documents:,} documents  {status.rate / 1e6:.1f} MB/s"
      if self._task is None:
        self._task = self._bar.add_task(status.job, total=status.tasks, text=text)
      self._bar.update(self._task, completed=status.done, text=text)
    self._bar.refresh()
