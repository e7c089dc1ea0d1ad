"""The metrics of runs: read from metrics.jsonl, and compared record by record."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from etils import epath

from jaxgpt.run import metric_writers, throughput
from jaxgpt.run.process import memory

# {(kind, step): record}, in the order of the steps
Curves: TypeAlias = dict[tuple[str, int], dict[str, Any]]

_PLACE = ("step", "kind")  # of a record


class Difference(NamedTuple):
  """The first record in which two runs differ.

  Attributes:
    step: Its step.
    kind: 'train' or 'validation'.
    metric: The metric, the loss if it differs.
    first, second: Its values.
  """

  step: int
  kind: str
  metric: str
  first: Any
  second: Any

  def describe(self) -> str:
    """Such as 'train loss at step 4: 2.5 and 2.6, a difference of 1.0e-01'."""
    text = f"{self.kind} {self.metric} at step {self.step}: {self.first!r} and {self.second!r}"
    if isinstance(self.first, float | int) and isinstance(self.second, float | int):
      text += f", a difference of {self.second - self.first:.2e}"
    return text


class Comparison(NamedTuple):
  """The metrics of two runs.

  Attributes:
    records: Records that both have.
    last: The last step of these, 0 without one.
    first_difference: None if they are equal.
    before: The last step of an equal record before that, 0 without one.
    largest: (step, difference) of the largest absolute difference of the training loss, or None.
  """

  records: int
  last: int
  first_difference: Difference | None
  before: int
  largest: tuple[int, float] | None

  def to_json(self) -> dict[str, Any]:
    """The comparison as plain JSON."""
    difference = self.first_difference
    return self._asdict() | {"first_difference": difference and difference._asdict()}


def read(folder: epath.PathLike) -> Curves:
  """The metrics of a run. A step that was repeated has its last record."""
  found = {(r["kind"], r["step"]): r for r in lazily(folder)}
  return dict(sorted(found.items(), key=lambda item: (item[0][1], item[0][0] != "train")))


def lazily(folder: epath.PathLike) -> Iterator[dict[str, Any]]:
  """The records of metrics.jsonl, one after another, as they were written."""
  path = epath.Path(folder) / metric_writers.JSONL
  if path.exists():
    with path.open("rb") as lines:
      for line in lines:
        if record := metric_writers.record(line.decode(errors="replace")):
          yield record


def is_exact(metric: str) -> bool:
  """Whether a metric follows from the numbers of a run, not from its speed or its machine."""
  return metric not in (*_PLACE, *throughput.METRICS, *memory.METRICS)


def compare(first: Curves, second: Curves, until: int | None = None) -> Comparison:
  """Compares the records that two runs have in common.

  Args:
    first, second: From `read`.
    until: The last step to compare. None: all.
  """
  common = [key for key in first if key in second and (until is None or key[1] <= until)]
  found, before, largest = None, 0, None
  for kind, step in common:
    a, b = first[kind, step], second[kind, step]
    if found is None:
      found = _difference(a, b, step, kind)
      before = step if found is None else before
    gap = _gap(a, b) if kind == "train" else None
    if gap is not None and (largest is None or gap > largest[1]):
      largest = step, gap
  last = max((step for _, step in common), default=0)
  return Comparison(len(common), last, found, before, largest if found else None)


def _difference(
  a: Mapping[str, Any], b: Mapping[str, Any], step: int, kind: str
) -> Difference | None:
  names = sorted(
    (name for name in a.keys() & b.keys() if is_exact(name)),
    key=lambda name: (name != "loss", name),
  )
  for name in names:
    if a[name] != b[name]:
      return Difference(step, kind, name, a[name], b[name])
  return None


def _gap(a: Mapping[str, Any], b: Mapping[str, Any]) -> float | None:
  x, y = a.get("loss"), b.get("loss")
  return None if x is None or y is None else abs(x - y)


def last_of(curves: Curves, kind: str, metric: str) -> float | None:
  """The last value of a metric, or None."""
  values = [r[metric] for (k, _), r in curves.items() if k == kind and r.get(metric) is not None]
  return values[-1] if values else None
