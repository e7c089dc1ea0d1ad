"""What has become of each run of a sweep, as its folder says.

A run's metrics and checkpoints are the only record of its progress, so that a kill at any moment
leaves nothing to repair. A run that failed has a record of its own, which is written at once:
FAILED/NAME.json in the folder of the sweep.
"""

import json
import math
from typing import Any, NamedTuple

from etils import epath

from jaxgpt.analysis import curves
from jaxgpt.analysis.sweep.members import Member, folder_of
from jaxgpt.errors import UserError, nearest
from jaxgpt.run import checkpoints, run_folder
from jaxgpt.storage import atomic, strict_json

FAILED = "failed"  # folder of the records of failures
DIVERGED, BROKEN = "diverged", "failed"
WORST = {False: math.inf, True: -math.inf}  # by whether the largest value is the best


class Failure(NamedTuple):
  """The end of a run that will not go on.

  Attributes:
    kind: DIVERGED, if a step was not finite, or BROKEN.
    message: The reason.
  """

  kind: str
  message: str


class State(NamedTuple):
  """How far a run is.

  Attributes:
    step: Step of the newest checkpoint, 0 without one.
    values: {step: metric of the validation split}. NaN: it was not finite.
    failure: Why the run ended, or None.
  """

  step: int
  values: dict[int, float]
  failure: Failure | None

  def value_at(self, step: int) -> float | None:
    """The metric at a step that is saved, or None if the run is not there yet."""
    return self.values.get(step) if self.step >= step else None

  def compared_at(self, step: int, maximize: bool) -> float | None:
    """The value by which the run is compared with others at a step.

    It is the worst one, +-inf, if the run diverged before or its metric is not finite. None: it is
    not there yet, or it failed for a reason that says nothing about its setting.
    """
    value = self.value_at(step)
    if value is None and (self.failure is None or self.failure.kind != DIVERGED):
      return None
    return value if value is not None and math.isfinite(value) else WORST[maximize]


def read(workdir: epath.PathLike, member: Member, metric: str) -> State:
  """The state of a run.

  Args:
    workdir: Folder of the sweep.
    member: The run.
    metric: Metric of the validation split.
  """
  folder = folder_of(workdir, member)
  failure = _failure(_failure_path(workdir, member))
  if not run_folder.is_run(folder):
    return State(0, {}, failure)
  records: dict[Any, dict[str, Any]] = curves.read(folder)
  found = {step: record for (kind, step), record in records.items() if kind == "validation"}
  names = sorted({name for record in found.values() for name in record} - {"kind", "step"})
  if found and metric not in names:
    raise UserError(
      f"sweep: metric={metric!r}: {nearest(metric, names)}evaluations of {folder} have "
      f"{', '.join(names)}"
    )
  values = {}
  for step, record in found.items():  # a task leaves out a metric that is not a number
    value = record.get(metric)
    values[step] = math.nan if value is None else float(value)
  saved = checkpoints.complete_steps(folder / run_folder.CHECKPOINTS)
  return State(max(saved, default=0), values, failure)


def fail(workdir: epath.PathLike, member: Member, failure: Failure) -> None:
  """Records that a run will not go on."""
  path = _failure_path(workdir, member)
  path.parent.mkdir(parents=True, exist_ok=True)
  atomic.write(path, strict_json.dumps(failure._asdict(), indent=1) + "\n")


def forget_failure(workdir: epath.PathLike, member: Member) -> None:
  """Lets a run that failed be tried again."""
  _failure_path(workdir, member).unlink(missing_ok=True)


def _failure_path(workdir: epath.PathLike, member: Member) -> epath.Path:
  return epath.Path(workdir) / FAILED / f"{member.name}.json"


def _failure(path: epath.Path) -> Failure | None:
  if not path.exists():
    return None
  try:
    found = json.loads(path.read_text())
    return Failure(str(found["kind"]), str(found["message"]))
  except (ValueError, KeyError, TypeError):
    return Failure(BROKEN, f"{path} is damaged; delete it to try the run again")
