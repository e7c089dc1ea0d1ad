"""Spikes of the loss: found, and undone by going back and leaving out the batches at fault.

A loss far above the last ones often stays high for long, and a run does not always recover. With
`train.spike.factor` a run goes back to the newest checkpoint before the spike, as PaLM's did by
hand (arXiv:2204.02311, section 5.1), and leaves out its batches:

  step       96  97  98  99 100 101 102 103
  loss      2.1 2.0 2.1 2.0 2.1 2.1 9.4        above median + factor * deviation of the last ones
  saved      │                      └ found; with train.spike.before=1 it began with batch 101
  again      96  97  98  99 100  ─   ─  103    steps 101 and 102 change nothing

All processes see the same losses, so they find the same spikes. What was seen is in each
checkpoint: a run that was interrupted finds the same ones as one that was not.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections

from jaxgpt.errors import UserError
from jaxgpt.run.provenance import rewinds as rewinds_lib
from jaxgpt.run.provenance.rewinds import Rewind
from jaxgpt.training import train_step

_NORMAL = 1.4826  # standard deviations of a normal distribution per median absolute deviation
_LEAST = 0.01  # least deviation, as a fraction of the median: losses that are almost constant


class SpikeError(UserError):
  """A spike of the loss after the last rewind. The state is not worth saving."""


class RewindError(Exception):
  """The run has to go back.

  Attributes:
    rewind: The steps to leave out from now on.
  """

  def __init__(self, rewind: Rewind):
    super().__init__(f"a spike of the loss at {rewind.describe()}")
    self.rewind = rewind


class Detector:
  """Finds spikes in the losses of a run's steps."""

  def __init__(self, c_spike: ml_collections.ConfigDict, state: Mapping[str, Any] | None = None):
    """Makes a detector.

    Args:
      c_spike: The config's `train.spike`.
      state: From `state`, to go on with. None: no loss was seen yet.
    """
    self._c = c_spike
    self._losses: list[float] = list((state or {}).get("losses", []))
    self._high: list[tuple[int, float]] = [(s, x) for s, x in (state or {}).get("high", [])]

  def state(self) -> dict[str, Any]:
    """What it has seen, as plain JSON."""
    return {"losses": self._losses, "high": self._high}

  def limit(self) -> float | None:
    """The largest loss that is no spike. None: too few losses were seen to tell."""
    if len(self._losses) < self._c.window:
      return None
    median = statistics.median(self._losses)
    deviation = _NORMAL * statistics.median(abs(x - median) for x in self._losses)
    return median + self._c.factor * max(deviation, _LEAST * abs(median))

  def add(self, step: int, loss: float) -> Rewind | None:
    """Adds the loss of a step.

    Args:
      step: Number of the step.
      loss: Its loss, finite.

    Returns:
      The rewind, if the loss is the last one of a spike.
    """
    limit = self.limit()
    if limit is not None and loss > limit:
      self._high.append((step, loss))
      if len(self._high) < self._c.patience:
        return None
      return Rewind(max(0, self._high[0][0] - self._c.before), step + 1, loss, limit)
    # Single losses above the limit that were no spike count like all others.
    seen = [*self._losses, *(x for _, x in self._high), loss]
    self._losses, self._high = seen[-self._c.window :], []
    return None


class Spikes:
  """The spikes of a run, those behind it and those to find. Does nothing if both are none."""

  def __init__(
    self,
    c_spike: ml_collections.ConfigDict,
    rewinds: Sequence[Rewind],
    state: Mapping[str, Any] | None,
  ):
    """Makes it.

    Args:
      c_spike: The config's `train.spike`.
      rewinds: The run's rewinds so far.
      state: The entry of the checkpoint from which the run goes on, see `state`, or None.
    """
    self._c, self._rewinds = c_spike, rewinds
    self._left_out = rewinds_lib.left_out(rewinds)
    self._detector = Detector(c_spike, state) if c_spike.factor else None

  def state(self) -> dict[str, Any]:
    """The entry of a checkpoint, {} if no spikes are looked for."""
    return {} if self._detector is None else {"spikes": self._detector.state()}

  def leaves_out(self, step: int) -> bool:
    """Whether the batch of a step is left out."""
    return step in self._left_out

  def metrics(self, step: int) -> dict[str, float]:
    """{'rewinds': their number before a step}, or {} if there were none."""
    count = sum(found.first < step for found in self._rewinds)
    return {"rewinds": count} if count else {}

  def check(self, step: int, loss: float) -> None:
    """Looks at the loss of a step.

    Raises:
      RewindError: It is a spike.
      SpikeError: It is a spike, and the run has gone back as often as it may.
    """
    found = None if self._detector is None else self._detector.add(step, loss)
    if found is None:
      return
    if len(self._rewinds) >= self._c.rewinds:
      raise SpikeError(
        f"the loss of step {step} is {loss:.4f}, above {found.limit:.4f}, and the run has gone "
        f"back train.spike.rewinds={self._c.rewinds} times already; go on with a lower optim.lr "
        "(add --accept-changes), or allow more rewinds"
      )
    raise RewindError(found)

  def check_not_finite(self, step: int) -> None:
    """Treats a step that is not finite as a spike, if the run may go back once more.

    Raises:
      RewindError: It may.
    """
    if self._detector is not None and len(self._rewinds) < self._c.rewinds:
      raise RewindError(Rewind(max(0, step - self._c.before), step + 1, None, None))

  def describe(self, since: int) -> list[str]:
    """Lines on the steps that are left out from a step on."""
    return [
      f"leaves out the batches of {found.describe()}, where the loss "
      + ("was not finite" if found.loss is None else f"rose to {found.loss:.4f}")
      for found in self._rewinds
      if found.end > since
    ]


def passed(state: train_step.State) -> train_step.State:
  """The state after a step that is left out. The state's buffers are donated."""
  shardings = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(train_step.passed_over, out_shardings=shardings, donate_argnums=0)(state)


def describe(found: Rewind, number: int, most: int) -> str:
  """A line on a spike that has just been found.

  Args:
    found: The rewind.
    number: Its number in the run, counted from 1.
    most: Rewinds of a run at most.
  """
  last = found.end - 1
  if found.loss is None or found.limit is None or not math.isfinite(found.loss):
    what = f"step {last} is not finite"
  else:
    what = f"the loss of step {last} is {found.loss:.4f}, above {found.limit:.4f}"
  return (
    f"{what}: goes back and leaves out the batches of {found.describe()} "
    f"(rewind {number} of at most {most})"
  )
