"""A polite end: the first signal is noted, so that the loop can save before it stops."""

import signal


class StopSignal:
  """Turns the first SIGINT or SIGTERM into a flag; a second one ends the program at once."""

  _SIGNALS = (signal.SIGINT, signal.SIGTERM)

  def __enter__(self):
    self.received = None
    self._old = {s: signal.signal(s, self._handle) for s in self._SIGNALS}
    return self

  def _handle(self, number, _):
    self.received = signal.Signals(number)
    for s, old in self._old.items():
      signal.signal(s, old)

  def __exit__(self, *_):
    for s, old in self._old.items():
      signal.signal(s, old)
