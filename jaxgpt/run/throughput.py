"""Throughput of a run: tokens per second, step time, input wait and MFU between two log lines.

And its goodput: the wall time of a start by what it went to.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

# The names of `Timer.take`. They differ between two runs of the same numbers.
METRICS = ("tokens_per_second", "step_time", "input_wait", "mfu")
# The parts of an account. The rest of the time is "steps".
COMPILE, INPUT, EVALUATION, SAVING = "compile", "input", "evaluation", "saving"
SAMPLING = "sampling"
STEPS, STARTUP, RESTORE = "steps", "startup", "restore"
ACTIVITIES = (STEPS, INPUT, COMPILE, EVALUATION, SAMPLING, SAVING, RESTORE, STARTUP)


class Timer:
  """Books the time of a start on one activity at a time, and measures its steps.

  Evaluation and saving do not count as time of steps. A timer begins in `STARTUP`.

  Attributes:
    flops_per_token: Model FLOPs, which may change from stage to stage.
    peak_flops: FLOP/s of all devices together, or None if unknown.
    began: When the start began, in seconds since the epoch.

  Example:
    >>> timer = Timer(flops_per_token=6e9, peak_flops=1e15)
    >>> timer.turn_to(STEPS)
    >>> with timer.waiting():
    ...   batch = next(batches)
    >>> timer.step_done(tokens=524_288)
    >>> timer.take()["tokens_per_second"]
  """

  def __init__(
    self, flops_per_token: float = 0.0, peak_flops: float | None = None, began: float | None = None
  ):
    """Makes a timer that has started.

    Args:
      flops_per_token: Model FLOPs, see `metrics.flops_per_token`.
      peak_flops: FLOP/s of all devices together, or None if unknown.
      began: When the start began, if the timer is made later: in seconds since the epoch.
    """
    self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
    now = time.time()
    self.began = now if began is None else min(began, now)
    self._spent = dict.fromkeys(ACTIVITIES, 0.0)
    self._spent[STARTUP] = now - self.began
    self._activity, self._booked = STARTUP, time.monotonic()
    self._waited = self._stepping = 0.0
    self.start()

  def _book(self) -> None:
    """Books the time since the last call on the present activity."""
    now = time.monotonic()
    seconds, self._booked = now - self._booked, now
    self._spent[self._activity] += seconds
    if self._activity == INPUT:
      self._waited += seconds
    if self._activity in (STEPS, INPUT):
      self._stepping += seconds

  def start(self) -> None:
    """Resets the rates."""
    self._book()
    self._steps, self._tokens = 0, 0.0
    self._waited = self._stepping = 0.0

  def turn_to(self, activity: str) -> str:
    """Books the time from now on on an activity. Returns the one before."""
    self._book()
    before, self._activity = self._activity, activity
    return before

  def step_done(self, tokens: float) -> None:
    """Counts a step and the tokens that the model read in it, without padding."""
    self._steps += 1
    self._tokens += tokens

  def waiting(self) -> contextlib.AbstractContextManager[None]:
    """Counts the time in this context as input wait."""
    return self.paused(INPUT)

  @contextlib.contextmanager
  def paused(self, activity: str) -> Iterator[None]:
    """Books the time in this context on an activity, and not on that of a context around it."""
    before = self.turn_to(activity)
    try:
      yield
    finally:
      self.turn_to(before)

  def account(self) -> dict[str, Any]:
    """The wall time since `began`: {'began': time in UTC, 'seconds': {activity: …}}."""
    self._book()
    return {
      "began": utc(self.began),
      "seconds": {name: round(self._spent[name], 3) for name in ACTIVITIES},
    }

  def take(self) -> dict[str, float]:
    """Returns the rates since the last call or `start`, and resets the timer.

    Returns:
      {'tokens_per_second', 'step_time' in seconds, 'input_wait' as a fraction of the time}, and
      'mfu' (model FLOPs utilization) if the devices' peak is known.
    """
    self._book()
    seconds = max(self._stepping, 1e-9)
    out = {
      "tokens_per_second": self._tokens / seconds,
      "step_time": seconds / max(self._steps, 1),
      "input_wait": self._waited / seconds,
    }
    if self.peak_flops:
      out["mfu"] = out["tokens_per_second"] * self.flops_per_token / self.peak_flops
    self.start()
    return out


def utc(seconds: float) -> str:
  """A time in seconds since the epoch as text to the millisecond: '2026-11-27T04:30:00.125Z'."""
  whole, thousandths = divmod(round(seconds * 1000), 1000)
  return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{thousandths:03d}Z"
