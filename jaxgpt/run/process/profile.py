"""A trace of some steps, for XProf, TensorBoard and Perfetto.

RUN/profile/plugins/profile/TIME/*.xplane.pb               tensorboard --logdir=RUN/profile
RUN/profile/plugins/profile/TIME/perfetto_trace.json.gz    https://ui.perfetto.dev
"""

from collections.abc import Callable, Sequence

import jax
from etils import epath

from jaxgpt.errors import first_line
from jaxgpt.run.process import output

FOLDER = "profile"


class Profile:
  """Traces the steps of a range. A trace that fails is said, and never ends the run."""

  def __init__(self, steps: Sequence[int], folder: epath.PathLike):
    """Makes a profile.

    Args:
      steps: (first, last), counted from 1, or () for none.
      folder: The run folder.
    """
    self._first, self._last = steps or (0, -1)
    self._folder = epath.Path(folder) / FOLDER
    self._running = False

  def before(self, step: int, wait: Callable[[], object]) -> None:
    """Begins or ends the trace if that is due. Called before each step.

    Args:
      step: The number of the step that comes next, from 1.
      wait: Waits for the steps before it.
    """
    if self._running and step > self._last:
      wait()
      self.close()
    elif not self._running and self._first <= step <= self._last:
      wait()
      start = lambda: jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
      self._running = self._try(start)

  def close(self) -> None:
    """Ends a trace that is running, and writes it."""
    if self._running:
      self._running = False
      self._first, self._last = 0, -1
      if self._try(jax.profiler.stop_trace):
        output.tell([f"{self._folder}: the trace is written"])

  def _try(self, call: Callable[[], object]) -> bool:
    try:
      call()
      return True
    except Exception as e:  # of the profiler, or of the disk
      output.warn(f"log.profile_steps: no trace is written, and the run goes on: {first_line(e)}")
      self._first, self._last = 0, -1
      return False
