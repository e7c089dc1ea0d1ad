"""Checkpoints of a run: when one is saved, and what happens if that fails.

A save goes on in the background while the run trains. `poll` finds out at the next step whether it
is complete. If it failed, the run says so and saves the state that it has by then:

  step 500   save ──✗ disk full
  step 501   said; try again at once ──✗
  step 502   said; the next try is in 5 s, then in 10 s, 20 s, … up to 5 minutes
     ⋮       the earlier checkpoints stay as they are

All processes save at the same steps. With several of them a failed save ends all, because they
could not agree on a retry: the launcher starts them again.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
from etils import epath

from jaxgpt.errors import UserError, first_line
from jaxgpt.parallel import distributed
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import run_folder
from jaxgpt.run.process import output

MOST_FAILURES = 5  # in a row: checkpoint.on_failure="stop", and the save at the end of a run
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0  # seconds from the second failure on

_ADVISED_AFTER = 600.0  # seconds of training
_DAY = 86_400.0  # seconds

# () -> (state, extra), see `Checkpoints.save`
Content = Callable[[], tuple[Mapping[str, Any], Mapping[str, Any]]]


class Saver:
  """Saves the checkpoints of one start of a run."""

  def __init__(
    self,
    c_checkpoint: ml_collections.ConfigDict,
    folder: epath.Path,
    checkpoints: checkpoints_lib.Checkpoints,
    mesh: jax.sharding.Mesh,
    account: Callable[[], Mapping[str, Any]],
  ):
    """Makes a saver.

    Args:
      c_checkpoint: The config's `checkpoint`.
      folder: The run folder.
      checkpoints: Where to save.
      mesh: The device mesh.
      account: Gives the wall time of this start, see `Timer.account`. That of the moment at which a
        save begins is recorded when it is complete: the steps since then would be lost.
    """
    self._c, self._folder, self._checkpoints = c_checkpoint, folder, checkpoints
    self._account, self._saved_account = account, account()
    self._clock = distributed.Agreement(mesh) if c_checkpoint.every_minutes else None
    self._since = time.monotonic()  # when the last save began
    self._asked = self._answered = 0  # saves that the clock of process 0 asked for
    self._blocked = self._saves = 0.0  # seconds in which saves held up the run, and their number
    self._failures = 0  # in a row
    self._retry_at: float | None = None
    self.newest = checkpoints.latest()  # step of the newest complete checkpoint

  def is_due(self, step: int) -> bool:
    """Whether to save after a step. All processes must call it at each step."""
    by_time = self._is_due_by_time()
    retry = self._retry_at is not None and time.monotonic() >= self._retry_at
    return by_time or retry or step % self._c.every == 0

  def _is_due_by_time(self) -> bool:
    if self._clock is None:
      return False
    if distributed.is_first() and time.monotonic() - self._since >= 60 * self._c.every_minutes:
      self._asked += 1
      self._since = time.monotonic()
    answered, self._answered = self._answered, self._clock.soon(self._asked)
    return self._answered > answered

  def save(self, content: Content) -> None:
    """Starts to save a state, or says that this failed.

    Args:
      content: Makes the state and the extra values of the checkpoint.

    Raises:
      SaveError: It failed, and the run ends for it.
    """
    self._since = time.monotonic()
    self._start_save(content)
    self._blocked += time.monotonic() - self._since
    self._saves += 1

  def _start_save(self, content: Content) -> None:
    try:
      self._note(self._checkpoints.wait())
    except checkpoints_lib.SaveError as e:
      self._failed(e)
    try:
      self._saved_account = self._account()
      self._checkpoints.save(*content())
      self._retry_at = None
    except checkpoints_lib.SaveError as e:
      self._failed(e)

  def poll(self) -> None:
    """Notices that a save became complete, or says that it failed. Does not wait.

    Raises:
      SaveError: It failed, and the run ends for it.
    """
    try:
      self._note(self._checkpoints.finished())
    except checkpoints_lib.SaveError as e:
      self._failed(e)

  def finish(self, content: Content, most_failures: int = MOST_FAILURES) -> None:
    """Saves the last state of a run and waits until it is complete.

    Args:
      content: See `save`.
      most_failures: Failures in a row after which it gives up.

    Raises:
      SaveError: It could not be saved.
    """
    for tries in range(most_failures):
      try:
        self._note(self._checkpoints.wait())
        self._saved_account = self._account()
        self._checkpoints.save(*content())
        self._note(self._checkpoints.wait())
        return
      except checkpoints_lib.SaveError as e:
        if tries == most_failures - 1:
          raise
        time.sleep(self._failed(e, tries))

  def _failed(self, error: checkpoints_lib.SaveError, tries: int | None = None) -> float:
    """Says that a save failed, and plans the next try.

    Args:
      error: The error.
      tries: At the end of a run: failures of the last save before this one. They alone determine
        the pause, since nothing else goes on meanwhile. None: in the run, which may end for it.

    Returns:
      The pause before the next try in seconds.
    """
    if jax.process_count() > 1:
      raise error
    step = self._checkpoints.forget_failure()
    self._failures += 1
    if tries is None and self._c.on_failure == "stop" and self._failures >= MOST_FAILURES:
      raise error
    earlier = self._failures - 1 if tries is None else tries
    pause = min(_FIRST_PAUSE * 2.0 ** (earlier - 1), _LONGEST_PAUSE) if earlier else 0.0
    self._retry_at = time.monotonic() + pause
    if self._failures == 1:
      self._record(run_folder.note_failed, step or 0)
    there = "there is none yet" if self.newest is None else f"the newest is of step {self.newest}"
    when = f"in {pause:g} s" if pause else "at once"
    output.warn(
      f"the checkpoint of step {step} could not be saved ({error.reason}); trying again {when}; "
      f"{there}"
    )
    return pause

  def advice(self, steps: int, began: float) -> list[str]:
    """A line on the cost of this start's saves and the interval that loses least, or [].

    Args:
      steps: Steps of this start.
      began: `time.monotonic()` at the first of them.
    """
    seconds = time.monotonic() - began
    if seconds < _ADVISED_AFTER or not self._saves or not steps:
      return []
    step_seconds = (seconds - self._blocked) / steps
    every = best_interval(self._blocked / self._saves, step_seconds, _DAY)
    return [
      f"checkpoints: {self._saves:.0f} saves held up training for {self._blocked:.1f} s "
      f"({self._blocked / seconds:.1%}); with one failure a day, checkpoint.every={every} loses "
      "least"
    ]

  def _note(self, step: int | None) -> None:
    """Records that the checkpoint of a step is complete."""
    if step is None:
      return
    self.newest = step
    if self._failures:
      output.warn(f"saved again: the checkpoint of step {step} is complete")
    self._failures, self._retry_at = 0, None
    if distributed.is_first():
      account = self._saved_account
      self._record(lambda folder, step: run_folder.note_saved(folder, step, account), step)

  def _record(self, note: Callable[[epath.Path, int], None], step: int) -> None:
    """Writes to the run's record of starts. `resume` also goes by the checkpoints themselves."""
    try:
      note(self._folder, step)
    except (OSError, UserError) as e:
      output.warn(f"starts.jsonl could not be written ({first_line(e)})")


def best_interval(save_seconds: float, step_seconds: float, failure_seconds: float) -> int:
  """Steps between checkpoints that lose the least time to saves and to repeated steps.

  sqrt(2 save_seconds failure_seconds) seconds (Young 1974; Daly 2006 for rare failures): after that
  time the saves cost as much as the steps that a failure repeats, half an interval on average.

  Args:
    save_seconds: Time for which a save holds up training.
    step_seconds: Time of a step.
    failure_seconds: Mean time between failures.
  """
  return max(1, round(math.sqrt(2 * save_seconds * failure_seconds) / step_seconds))
