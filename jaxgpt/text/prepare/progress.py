"""What a preparation says on a terminal: lines, and beneath them how far a stage is."""

import sys

from rich import console, progress


class Terminal:
  """Says lines on stdout, and shows the stage at work on stderr where that is a terminal.

  A context manager; called with a line. `show` takes a `stages.Status`, or None where a stage is
  over; it is itself None where there is no terminal.
  """

  def __init__(self):
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
    self._task = None
    self.show = self._show if screen.is_terminal else None

  def __enter__(self):
    if self.show:
      self._bar.start()
    return self

  def __exit__(self, *_):
    if self.show:
      self._bar.stop()

  def __call__(self, line):
    print(line, flush=True)

  def _show(self, status):
    if status is None:
      if self._task is not None:
        self._bar.remove_task(self._task)
        self._task = None
    else:
      text = f"{status.documents:,} documents  {status.rate / 1e6:.1f} MB/s"
      if self._task is None:
        self._task = self._bar.add_task(status.stage, total=status.tasks, text=text)
      self._bar.update(self._task, completed=status.done, text=text)
    self._bar.refresh()
