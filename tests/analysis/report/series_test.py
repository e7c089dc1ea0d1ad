"""Metrics in few points: against their definition, and as the page reads them."""

import base64

import numpy as np
import pytest

from jaxgpt.analysis.report import series


@pytest.fixture(scope="module")
def records():
  rng = np.random.default_rng(0)
  out = {}
  for step in range(2, 2002, 2):
    loss = float(rng.normal())
    loss = 50.0 if step == 778 else None if step in (100, 102) else loss
    out["train", step] = {"step": step, "kind": "train", "loss": loss, "step_time": 1.8}
    if step % 500 == 0:
      out["validation", step] = {"step": step, "kind": "validation", "loss": 1.0}
  return out


def test_points_are_the_mean_and_the_extremes_of_their_records(records):
  found = series.of(records, 64)["train"]
  points = found.metrics["loss"]
  assert len(found.first) == len(points.mean) == 64 and found.records == 1000
  assert found.first[0] == 2 and found.last[-1] == 2000
  for i, (first, last) in enumerate(zip(found.first, found.last)):
    values = [records["train", s]["loss"] for s in range(first, last + 1, 2)]
    values = [value for value in values if value is not None]
    assert points.mean[i] == pytest.approx(np.mean(values))
    assert (points.low[i], points.high[i]) == (min(values), max(values))
  assert list(found.first[1:]) == list(found.last[:-1] + 2)  # no record is left out
  assert points.high.max() == 50.0 and points.missing == 2


def test_few_records_are_drawn_as_they_are(records):
  found = series.of(records, 1000)
  packed = series.to_json(found["train"])
  assert "first" not in packed and "low" not in packed["metrics"]["loss"]
  steps = np.frombuffer(base64.b64decode(packed["last"]), "<u4")
  loss = np.frombuffer(base64.b64decode(packed["metrics"]["loss"]["mean"]), "<f4")
  wanted = [np.nan if (v := records["train", s]["loss"]) is None else v for s in steps]
  np.testing.assert_array_equal(loss, np.float32(wanted))
  assert packed["metrics"]["loss"]["missing"] == 2
  assert list(found["validation"].last) == [500, 1000, 1500, 2000]


def test_training_time_counts_the_steps_between_log_lines(records):
  found = series.of(records, 10)
  np.testing.assert_allclose(found["train"].hours, found["train"].last * 1.8 / 3600)
  np.testing.assert_allclose(found["validation"].hours, [0.25, 0.5, 0.75, 1.0])
  without = {place: {**record, "step_time": None} for place, record in records.items()}
  assert series.of(without, 10)["train"].hours is None


def test_more_runs_get_fewer_buckets_each():
  one, ten = (series.buckets([13] * n, 2_500_000) for n in (1, 10))
  assert one == 2000 and 1000 < ten < 2000 and series.buckets([13] * 1000, 2_500_000) == 100
