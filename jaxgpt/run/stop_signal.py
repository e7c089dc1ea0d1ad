"""Stop signals: the first one is noted, so that the training loop can save before it stops."""

import signal
import types
from typing import Any


class StopSignal:
  """Turns the first SIGINT or SIGTERM into a flag. A second one ends the program at once.

  Attributes:
    received: The signal, or None.

  Example:
    >>> with StopSignal() as stop:
    ...   while not stop.received:
    ...     step()
  """

  _SIGNALS = (signal.SIGINT, signal.SIGTERM)

  def __enter__(self) -> "StopSignal":
    self.received: signal.Signals | None = None
    self._old: dict[signal.Signals, Any] = {
      s: signal.signal(s, self._handle) for s in self._SIGNALS
    }
    return self

  def _handle(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    self.received = signal.Signals(number)
    self._restore()

  def __exit__(self, *error: object) -> None:
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)
