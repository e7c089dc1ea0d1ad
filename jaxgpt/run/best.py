"""The best checkpoint of a run by a metric, and the end of a run that stops improving.

RUN/best/STEP has the weights of one evaluation, and their moving average if the run keeps one.
Which step is the best follows from the values in RUN/metrics.jsonl up to the step at which a start
begins, so a resumed run decides as one that never stopped.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from jaxgpt.config import options
from jaxgpt.errors import UserError, nearest
from jaxgpt.parallel import distributed
from jaxgpt.run import checkpoints, metric_writers

FOLDER = "best"
ITEMS = ("params", "ema", "step", "nonfinite_step")  # of the state that a best checkpoint has
KIND = "validation"  # of the records in metrics.jsonl
# Ends of the names of metrics of which less is better. The last two are of lm-eval.
_LOWER = re.compile(r"(.*_)?(loss|kl|perplexity|bits_per_byte|mse|mae|error|brier_score|ter)")
_NOT_METRICS = ("step", "kind", "tokens", "batches")


def less_is_better(metric: str) -> bool:
  """Whether a lower value of a validation metric is better: losses and errors.

  A name may have a folder of data behind it (`loss/web`), or a task before it and a filter behind
  it (`wikitext/word_perplexity`, `TASK/METRIC/FILTER`).
  """
  first, *rest = metric.split("/")
  return first == "loss" or any(map(_LOWER.fullmatch, rest or [first]))


class Best:
  """The best of the evaluations so far.

  Example:
    >>> best = Best("accuracy", {100: 0.5, 200: 0.8, 300: 0.7})
    >>> best.step, best.since
    (200, 1)
  """

  def __init__(self, metric: str, values: Mapping[int, float]):
    """Args: metric: Name of a validation metric. values: {step: its value so far}."""
    self._metric, self._values = metric, dict(values)

  @property
  def step(self) -> int | None:
    """The first step with the best value, or None before the first finite one."""
    sign = 1 if less_is_better(self._metric) else -1
    finite = [(sign * v, s) for s, v in self._values.items() if math.isfinite(v)]
    return min(finite)[1] if finite else None

  @property
  def value(self) -> float | None:
    """The best value."""
    return None if self.step is None else self._values[self.step]

  @property
  def since(self) -> int:
    """Evaluations after the best one."""
    return sum(self.step is None or step > self.step for step in self._values)

  def add(self, step: int, result: Mapping[str, Any]) -> None:
    """Adds the metrics of a step. Adding a step again changes nothing.

    Raises:
      UserError: The metric is not among them.
    """
    names = [name for name in result if name not in _NOT_METRICS]
    if self._metric not in result:
      raise UserError(
        f"checkpoint.best={self._metric!r}: {nearest(self._metric, names)}this run's evaluation "
        f"gives {', '.join(names)}"
      )
    value = result[self._metric]  # a metric that is not finite is null in metrics.jsonl
    self._values[step] = math.nan if value is None else float(value)


def of_run(folder: epath.PathLike, metric: str, step: int) -> Best:
  """The best of a run up to a step, the same in all processes.

  Args:
    folder: The run folder.
    metric: Name of a validation metric.
    step: Step at which this start of the run begins. Later evaluations are repeated.
  """
  found: list[list[Any]] = []
  path = epath.Path(folder) / metric_writers.JSONL
  if distributed.is_first() and path.exists():
    lines = (metric_writers.record(line) for line in metric_writers.read(path).split("\n"))
    there = [line for line in lines if line and line["kind"] == KIND and line["step"] <= step]
    found = [[line["step"], line[metric]] for line in there if metric in line]
  values = distributed.share(found)
  return Best(metric, {step: math.nan if v is None else v for step, v in values})


@contextlib.contextmanager
def keeper(folder: epath.PathLike, step: int) -> Iterator[checkpoints.Checkpoints]:
  """The checkpoints in RUN/best, of which the newest stays. All processes must call it.

  Args:
    folder: The run folder.
    step: Step at which this start begins. Checkpoints of later steps are deleted: the run repeats
      these steps, and Orbax saves no step below the newest.
  """
  kept = checkpoints.Checkpoints(epath.Path(folder) / FOLDER, keep=1)
  try:
    kept.delete_after(step)
    yield kept
  finally:
    kept.close()


def check(folder: epath.PathLike, step: str = options.BEST) -> epath.Path:
  """The folder of a run's best checkpoint.

  Args:
    folder: The run folder.
    step: The name that the user gave.

  Raises:
    UserError: There is none, or the name is another one.
  """
  if step != options.BEST:
    raise UserError(f"--step={step}: give the number of a step, or {options.BEST}")
  where = epath.Path(folder) / FOLDER
  if not checkpoints.complete_steps(where):
    raise UserError(
      f"--step=best: {folder} has no best checkpoint; train with --config.checkpoint.best=METRIC, "
      "or leave --step out for the newest"
    )
  return where
