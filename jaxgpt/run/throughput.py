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
STEPS = "steps"
ACTIVITIES = (STEPS, INPUT, COMPILE, EVALUATION, SAVING)


class Timer:
  """Measures steps. Evaluation and saving do not count.

  Attributes:
    flops_per_token: Model FLOPs, which may change from stage to stage.
    began: When the timer was made, in seconds since the epoch.

  Example:
    >>> timer = Timer(flops_per_token=6e9, peak_flops=1e15)
    >>> with timer.waiting():
    ...   batch = next(batches)
    >>> timer.step_done(tokens=524_288)
    >>> timer.take()["tokens_per_second"]
  """

  def __init__(self, flops_per_token: float, peak_flops: float | None):
    """Makes a timer that has started.

    Args:
      flops_per_token: Model FLOPs, see `metrics.flops_per_token`.
      peak_flops: FLOP/s of all devices together, or None if unknown.
    """
    self.flops_per_token, self._peak_flops = flops_per_token, peak_flops
    self.began, self._made = time.time(), time.monotonic()
    self._spent = dict.fromkeys((COMPILE, INPUT, EVALUATION, SAVING), 0.0)
    self.start()

  def start(self) -> None:
    """Resets the timer."""
    self._since, self._steps, self._tokens = time.monotonic(), 0, 0.0
    self._waited = self._paused = 0.0

  def step_done(self, tokens: float) -> None:
    """Counts a step and the tokens that the model read in it, without padding."""
    self._steps += 1
    self._tokens += tokens

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time in this context as input wait."""
    before = time.monotonic()
    yield
    seconds = time.monotonic() - before
    self._waited += seconds
    self._spent[INPUT] += seconds

  @contextlib.contextmanager
  def paused(self, activity: str) -> Iterator[None]:
    """Excludes the time in this context, and books it on an activity of the account."""
    before = time.monotonic()
    yield
    seconds = time.monotonic() - before
    self._paused += seconds
    self._spent[activity] += seconds

  def account(self) -> dict[str, Any]:
    """The wall time since the timer was made: {'began': time in UTC, 'seconds': {activity: …}}."""
    rest = max(time.monotonic() - self._made - sum(self._spent.values()), 0.0)
    seconds = {STEPS: rest, **self._spent}
    return {
      "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.began)),
      "seconds": {name: round(seconds[name], 3) for name in ACTIVITIES},
    }

  def take(self) -> dict[str, float]:
    """Returns the rates since the last call or `start`, and resets the timer.

    Returns:
      {'tokens_per_second', 'step_time' in seconds, 'input_wait' as a fraction of the time}, and
      'mfu' (model FLOPs utilization) if the devices' peak is known.
    """
    seconds = max(time.monotonic() - self._since - self._paused, 1e-9)
    out = {
      "tokens_per_second": self._tokens / seconds,
      "step_time": seconds / max(self._steps, 1),
      "input_wait": self._waited / seconds,
    }
    if self._peak_flops:
      out["mfu"] = out["tokens_per_second"] * self.flops_per_token / self._peak_flops
    self.start()
    return out
