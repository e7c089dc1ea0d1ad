"""A watchdog: the stacks of a process that hangs, on standard error."""

import faulthandler
import time

_STDERR = 2
_SECONDS = 1.0  # between two resets of the clock


class Watchdog:
  """Prints the stacks of all threads if `alive` is not called for some minutes.

  It prints them again after as many minutes. The interpreter's `faulthandler` does it,
  which works even if a library never returns.

  Example:
    >>> watchdog = Watchdog(minutes=30)
    >>> for batch in batches:
    ...   watchdog.alive()
    ...   step(batch)
    >>> watchdog.close()
  """

  def __init__(self, minutes: float):
    """Args: minutes: 0: never."""
    self._seconds, self._reset = 60 * minutes, 0.0
    self.alive()

  def alive(self) -> None:
    """Restarts the clock. Cheap enough for every step."""
    now = time.monotonic()
    if self._seconds and now - self._reset >= min(_SECONDS, self._seconds / 2):
      self._reset = now
      faulthandler.dump_traceback_later(self._seconds, repeat=True, file=_STDERR)

  def close(self) -> None:
    """Ends the watch."""
    if self._seconds:
      faulthandler.cancel_dump_traceback_later()
