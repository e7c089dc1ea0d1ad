"""The metrics of a run in few points: the mean of each bucket of records, and its extremes.

  records   ·   ·  · ·    ·    ·  ·   · ·         100,000 log lines
            └── bucket ──┘└── bucket ──┘
  point     mean, low, high, first and last step    at most a few thousand

A spike of a single log line stays visible: the page draws low and high as a band.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.analysis import curves

_PLACE = ("step", "kind")


class Points(NamedTuple):
  """A metric in buckets. NaN: no finite number in the bucket.

  Attributes:
    mean: [buckets] float64.
    low, high: The extremes of each bucket.
    newest: The last finite number, or None.
    missing: Records whose number was not finite.
  """

  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  newest: float | None
  missing: int


class Series(NamedTuple):
  """All metrics of a kind of records.

  Attributes:
    first, last: [buckets] int64, the steps of the first and the last record of each bucket.
    hours: [buckets] training time at `last`, or None if no step times were logged.
    records: Records in all.
    metrics: {name: points}.
  """

  first: np.ndarray
  last: np.ndarray
  hours: np.ndarray | None
  records: int
  metrics: dict[str, Points]


def of(records: curves.Curves, most: int) -> dict[str, Series]:
  """The series of a run.

  Args:
    records: Its metrics, from `curves.read`.
    most: Most buckets of a series.

  Returns:
    {kind: series}, such as 'train' and 'validation'.
  """
  by_kind: dict[str, list[Mapping[str, Any]]] = {}
  for (kind, _), record in records.items():
    by_kind.setdefault(kind, []).append(record)
  clock = _clock(by_kind.get("train", []))
  return {kind: _series(found, most, clock) for kind, found in by_kind.items()}


def _clock(train: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray] | None:
  """Steps, and the training time up to them in hours. None if it was not logged throughout."""
  steps = np.array([0, *(record["step"] for record in train)], np.int64)
  times = _column(train, "step_time")
  if not len(train) or np.isnan(times).any():
    return None
  return steps, np.concatenate([[0.0], np.cumsum(times * np.diff(steps))]) / 3600


def _series(
  records: Sequence[Mapping[str, Any]],
  most: int,
  clock: tuple[np.ndarray, np.ndarray] | None,
) -> Series:
  """The series of records of one kind, in the order of their steps."""
  steps = np.array([record["step"] for record in records], np.int64)
  count = min(len(records), most)
  starts = np.linspace(0, len(records), count, endpoint=False).astype(int)
  ends = np.append(starts[1:], len(records)) - 1
  names = dict.fromkeys(
    name
    for record in records
    for name, value in record.items()
    if name not in _PLACE and (value is None or isinstance(value, int | float))
  )
  hours = None if clock is None else np.interp(steps[ends], *clock)
  metrics = {name: _points(records, name, starts) for name in names}
  return Series(steps[starts], steps[ends], hours, len(records), metrics)


def _points(records: Sequence[Mapping[str, Any]], name: str, starts: np.ndarray) -> Points:
  values = _column(records, name)
  there = ~np.isnan(values)
  count = np.add.reduceat(there, starts, dtype=np.int64)
  total = np.add.reduceat(np.where(there, values, 0.0), starts)
  mean = np.full(len(starts), np.nan)
  np.divide(total, count, out=mean, where=count > 0)
  low, high = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
  missing = sum(name in record and record[name] is None for record in records)
  newest = float(values[there][-1]) if there.any() else None
  return Points(mean, low, high, newest, missing)


def _column(records: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
  return np.array([np.nan if (v := r.get(name)) is None else v for r in records], np.float64)


def buckets(metrics: Sequence[int], most_bytes: int, bounds: tuple[int, int] = (100, 2000)) -> int:
  """The number of buckets with which the points of all runs fit a size.

  Args:
    metrics: Number of metrics of each run.
    most_bytes: Size of all points on the page.
    bounds: Least and most buckets.
  """
  per_bucket = sum(3 * count + 3 for count in metrics) * 4 * 4 / 3  # float32 as base64
  return int(np.clip(most_bytes // max(per_bucket, 1.0), *bounds))


def to_json(series: Series) -> dict[str, Any]:
  """A series as the page's script reads it: float32 and uint32 arrays as base64."""
  exact = len(series.first) == series.records
  out: dict[str, Any] = {
    "last": _packed(series.last, "<u4"),
    "records": series.records,
    "metrics": {name: _points_json(points, exact) for name, points in series.metrics.items()},
  }
  if not exact:
    out["first"] = _packed(series.first, "<u4")
  if series.hours is not None:
    out["hours"] = _packed(series.hours, "<f4")
  return out


def _points_json(points: Points, exact: bool) -> dict[str, Any]:
  out: dict[str, Any] = {"mean": _packed(points.mean, "<f4")}
  if not exact:
    out |= {"low": _packed(points.low, "<f4"), "high": _packed(points.high, "<f4")}
  return out | ({"missing": points.missing} if points.missing else {})


def _packed(values: np.ndarray, dtype: str) -> str:
  with np.errstate(over="ignore"):  # beyond float32 there is infinity, which no plot shows
    return base64.b64encode(values.astype(dtype).tobytes()).decode()
