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
  ):
    """Args: c_checkpoint: The config's `checkpoint`. folder: The run folder."""
    self._c, self._folder, self._checkpoints = c_checkpoint, folder, checkpoints
    self._clock = distributed.Agreement(mesh) if c_checkpoint.every_minutes else None
    self._since = time.monotonic()  # when the last save began
    self._asked = self._answered = 0  # saves that the clock of process 0 asked for
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
    try:
      self._note(self._checkpoints.wait())
    except checkpoints_lib.SaveError as e:
      self._failed(e)
    try:
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
    for left in reversed(range(most_failures)):
      try:
        self._note(self._checkpoints.wait())
        self._checkpoints.save(*content())
        self._note(self._checkpoints.wait())
        return
      except checkpoints_lib.SaveError as e:
        if not left:
          raise
        time.sleep(self._failed(e, ends=False))

  def _failed(self, error: checkpoints_lib.SaveError, ends: bool = True) -> float:
    """Says that a save failed, and plans the next try.

    Args:
      error: The error.
      ends: Whether the run may end for it.

    Returns:
      The pause before the next try in seconds.
    """
    if jax.process_count() > 1:
      raise error
    step = self._checkpoints.forget_failure()
    self._failures += 1
    if ends and self._c.on_failure == "stop" and self._failures >= MOST_FAILURES:
      raise error
    pause = 0.0
    if self._failures > 1:
      pause = min(_FIRST_PAUSE * 2.0 ** (self._failures - 2), _LONGEST_PAUSE)
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

  def _note(self, step: int | None) -> None:
    """Records that the checkpoint of a step is complete."""
    if step is None:
      return
    self.newest = step
    if self._failures:
      output.warn(f"saved again: the checkpoint of step {step} is complete")
    self._failures, self._retry_at = 0, None
    if distributed.is_first():
      self._record(run_folder.note_saved, step)

  def _record(self, note: Callable[[epath.Path, int], None], step: int) -> None:
    """Writes to the run's record of starts. `resume` also goes by the checkpoints themselves."""
    try:
      note(self._folder, step)
    except (OSError, UserError) as e:
      output.warn(f"starts.jsonl could not be written ({first_line(e)})")
