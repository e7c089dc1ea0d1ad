"""Stop signals: the first one is noted, so that the training loop can save before it stops."""

import contextlib
import signal
import threading
import types
from collections.abc import Iterator
from typing import Any

_STOP = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
  """Turns the first SIGINT or SIGTERM into a flag. A second one ends the program at once.

  With `hangup`, SIGHUP sets the flag too. It comes when a terminal is closed or a connection is
  lost, often twice and together with SIGTERM, so it never counts as the second. Where SIGHUP is
  ignored (`nohup`), it stays so.

  Attributes:
    received: The signal, or None.

  Example:
    >>> with StopSignal() as stop:
    ...   while not stop.received:
    ...     step()
  """

  def __init__(self, hangup: bool = False):
    """Args: hangup: Whether SIGHUP is a stop signal."""
    self._hangup = hangup
    self.received: signal.Signals | None = None

  def __enter__(self) -> "StopSignal":
    self._old: dict[signal.Signals, Any] = {s: signal.signal(s, self._handle) for s in _STOP}
    self._old_hangup: Any = None
    if self._hangup and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
      self._old_hangup = signal.signal(signal.SIGHUP, self._handle)
    return self

  def _handle(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    self.received = self.received or signal.Signals(number)
    if number != signal.SIGHUP:
      self._restore()

  def __exit__(self, *error: object) -> None:
    self._restore()
    if self._old_hangup is not None:
      signal.signal(signal.SIGHUP, self._old_hangup)

  def _restore(self) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
  """Within this context SIGINT ends the program without a traceback, as SIGTERM does.

  For the time before a `StopSignal`: imports and compiled libraries neither swallow such a signal
  nor break in the middle of a module. In other threads than the main one, and where SIGINT is
  ignored or handled by others, nothing changes.
  """
  mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
  if not mine or threading.current_thread() is not threading.main_thread():
    yield
    return
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, signal.default_int_handler)
