"""The step from which a run goes on, and the check that its checkpoints are still there.

`train` and `doctor` both ask `find`. A run without a checkpoint starts at step 0, and that is right
if it was killed before its first checkpoint. If it had one, its checkpoints are gone: starting over
would drop the metrics of a run that someone believes to be resumed.

These show that a checkpoint existed:

- the records of earlier starts: each notes the step where it began and the newest complete save
- metrics.jsonl: a save waits for the one before it, so metrics of a step above twice
  `checkpoint.every` come after a complete one, unless a start records that a save failed
"""

from typing import NamedTuple

from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.run import checkpoints, metric_writers, run_folder


class Resume(NamedTuple):
  """Where a run goes on.

  Attributes:
    step: Step of the newest checkpoint. None: the run starts at step 0 without one.
    reached: The last step of metrics.jsonl, 0 without metrics. Steps after `step` are repeated.
  """

  step: int | None
  reached: int

  def describe(self, steps: int) -> str:
    """One line for the user.

    Args:
      steps: The run's number of steps.
    """
    lost = self.reached - (self.step or 0)
    repeats = f"; metrics.jsonl ends at step {self.reached}: {lost} steps are repeated"
    repeats = repeats if lost > 0 else ""
    if self.step is None:
      return f"starts at step 0 of {steps}{repeats}"
    if self.step >= steps:
      return f"all {steps} steps are done"
    return f"resumes at step {self.step} of {steps}{repeats}"


def find(folder: epath.PathLike, reached: int | None = None) -> Resume:
  """Finds the step from which a run goes on. Writes nothing.

  Args:
    folder: The run folder. It need not exist.
    reached: The last step of its metrics, if they have been read.

  Raises:
    UserError: The run had checkpoints, and none is left.
  """
  folder = epath.Path(folder)
  if not run_folder.is_run(folder):
    return Resume(None, 0)
  step = max(checkpoints.complete_steps(folder / run_folder.CHECKPOINTS), default=None)
  reached = _last_metrics(folder) if reached is None else reached
  if step is None and (known := _known_checkpoint(folder, reached)):
    raise UserError(
      f"--workdir={folder} holds a run of {max(reached, known)} steps whose checkpoints are gone: "
      f"{folder / run_folder.CHECKPOINTS} has none; restore that folder to go on, delete the run "
      "folder to start over, or choose another --workdir"
    )
  return Resume(step, reached)


def _last_metrics(folder: epath.Path) -> int:
  """The last step in metrics.jsonl, 0 if there is none."""
  path = folder / metric_writers.JSONL
  try:
    records = map(
      metric_writers.record, metric_writers.read(path).splitlines() if path.exists() else ()
    )
    return max((record["step"] for record in records if record), default=0)
  except OSError:  # the writer will meet it again and report it
    return 0


def _known_checkpoint(folder: epath.Path, reached: int) -> int:
  """A step that certainly had a complete checkpoint, or 0."""
  try:
    starts = run_folder.read_starts(folder)
  except UserError:  # a kill left a run without its first start
    starts = []
  noted = max([start.get(key) or 0 for start in starts for key in ("step", "saved")], default=0)
  if any("failed" in start for start in starts):
    return noted
  # It may differ from start to start, and config.json has that of the first one.
  all_of = [start.get("config", {}).get("checkpoint.every") for start in starts]
  all_of = [value for value in all_of if value is not None]
  every = max(all_of) if all_of else run_folder.read_config(folder).checkpoint.every
  never = not every or 0 in all_of
  return max(noted, every if not never and reached > 2 * every else 0)
