"""The account of wall time of a run with kills and a preemption equals that of a clock outside."""

import pytest

from tests.faults import goodput


@pytest.mark.slow
def test_the_account_adds_up_over_kills_and_a_preemption(tmp_path):
  measured = goodput.measure(tmp_path, kills=3, seed=1)
  found = goodput.account(tmp_path / "run")
  assert sorted(measured.codes) == [-9, -9, -9, 0, 143]
  assert found["starts"] == 5 and found["parts"]["lost"] > 0
  assert abs(found["seconds"] - measured.wall) < goodput.TOLERANCE * measured.wall
  between = found["parts"]["between starts"]
  assert abs(between - measured.between) < goodput.BETWEEN * measured.wall
  assert found["repeated_steps"] == measured.repeated
