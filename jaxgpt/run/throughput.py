"""Where the time of a run goes: steps, waiting for data, and everything that is neither."""

import contextlib
import time


class Timer:
  """Rates over the steps between two log lines; evaluation and saving don't count."""

  def __init__(self, flops_per_token, peak_flops):
    """Starts when `start` is called.

    Args:
      flops_per_token: model FLOPs, see `metrics.flops_per_token`.
      peak_flops: FLOP/s of all devices together, or None where unknown.
    """
    self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
    self.start()

  def start(self):
    """Forgets what was measured, and measures from now on."""
    self._since, self._steps, self._tokens = time.monotonic(), 0, 0.0
    self._waited = self._paused = 0.0

  def step_done(self, tokens):
    """Counts a step and the tokens it was trained on."""
    self._steps += 1
    self._tokens += tokens

  @contextlib.contextmanager
  def waiting(self):
    """Time in here is input wait."""
    before = time.monotonic()
    yield
    self._waited += time.monotonic() - before

  @contextlib.contextmanager
  def paused(self):
    """Time in here is not training."""
    before = time.monotonic()
    yield
    self._paused += time.monotonic() - before

  def take(self):
    """The rates since the last call or `start`, and starts anew.

    Returns:
      {'tokens_per_second', 'step_time' in seconds, 'input_wait' as a share of the time}, and
      'mfu' where the devices' peak is known.
    """
    seconds = max(time.monotonic() - self._since - self._paused, 1e-9)
    out = {
      "tokens_per_second": self._tokens / seconds,
      "step_time": seconds / max(self._steps, 1),
      "input_wait": self._waited / seconds,
    }
    if self._peak_flops:
      out["mfu"] = out["tokens_per_second"] * self._flops_per_token / self._peak_flops
    self.start()
    return out
