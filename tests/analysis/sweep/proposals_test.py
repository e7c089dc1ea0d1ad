"""Searches: settings that follow from results, and what a second start makes of them."""

import json
import math

import pytest

pytest.importorskip("optuna", reason="the extra [optuna] is not installed")

from jaxgpt.analysis.sweep import (
  TPE,
  Halving,
  Sweep,
  choice,
  integers,
  log_uniform,
  proposals,
  state,
  uniform,
)
from jaxgpt.analysis.sweep.proposals import Result
from jaxgpt.errors import UserError
from tests.analysis.sweep.sweep_test import base  # noqa: F401

SPACE = {
  "optim.lr": log_uniform(1e-4, 1e-1),
  "optim.b2": uniform(0.8, 0.999),
  "optim.name": choice("adamw", "lion", "muon"),
  "schedule.warmup_steps": integers(1, 20),
}


def loss(setting):
  """Least at lr = 0.01, b2 = 0.95 with adamw and few steps of warm-up."""
  return (
    math.log10(setting["optim.lr"] / 0.01) ** 2
    + 20 * (setting["optim.b2"] - 0.95) ** 2
    + 0.5 * (setting["optim.name"] != "adamw")
    + 0.01 * setting["schedule.warmup_steps"]
  )


def searched(sweep, value):
  settings = [Result(s, value(s)) for s in sweep.settings()]
  while len(settings) < sweep.samples:
    count = min(sweep.search.batch, sweep.samples - len(settings))
    settings += [Result(s, value(s)) for s in proposals.proposed(sweep, settings, count)]
  return settings


def test_a_search_finds_better_settings_than_chance():
  """The mean of the last ten settings, which a random search would not lower."""
  late, early = [], []
  for seed in range(5):
    sweep = Sweep(random=SPACE, samples=40, random_seed=seed, search=TPE(startup=10))
    values = [r.value for r in searched(sweep, loss)]
    early.append(sum(values[:10]) / 10)
    late.append(sum(values[-10:]) / 10)
  assert sum(late) < 0.5 * sum(early)
  sweep = Sweep(random=SPACE, samples=40, search=TPE(startup=10), maximize=True)
  values = [r.value for r in searched(sweep, lambda s: -loss(s))]
  assert sum(values[-10:]) > 0.6 * sum(values[:10]), "of a metric that is to be large, too"


def test_settings_are_in_the_space_all_different_and_the_same_each_time():
  sweep = Sweep(random=SPACE, samples=30, search=TPE(startup=6, batch=5))
  found = [r.setting for r in searched(sweep, loss)]
  assert found == [r.setting for r in searched(sweep, loss)]
  assert len(found) == 30 == len({repr(s) for s in found})
  for setting in found:
    assert 1e-4 <= setting["optim.lr"] <= 1e-1 and 0.8 <= setting["optim.b2"] <= 0.999
    assert setting["optim.name"] in ("adamw", "lion", "muon")
    assert isinstance(setting["schedule.warmup_steps"], int)
    assert float(f"{setting['optim.lr']:.4g}") == setting["optim.lr"]


def test_settings_that_fail_count_as_the_worst():
  sweep = Sweep(random={"optim.lr": log_uniform(1e-4, 1e-1)}, samples=40, search=TPE(startup=10))
  found = searched(sweep, lambda s: None if s["optim.lr"] > 3e-3 else s["optim.lr"])
  assert sum(r.value is None for r in found[20:]) < sum(r.value is None for r in found[:10])
  assert all(r.value is None for r in searched(sweep, lambda s: None)), "none works"


def test_a_space_without_a_further_setting_is_refused():
  sweep = Sweep(random={"optim.name": choice("adamw", "lion")}, samples=3, search=TPE(startup=2))
  with pytest.raises(UserError, match="gives no setting beyond 2"):
    searched(sweep, lambda s: 1.0)


@pytest.mark.parametrize(
  "options, words",
  [
    (dict(samples=4), r"startup=8 must be from 1 to below samples=4"),
    (dict(grid={"optim.b1": (0.9,)}), "leave grid out"),
    (dict(halving=Halving(steps=(4,))), "leave halving out"),
    (dict(search=TPE(batch=0)), "batch=0 at least 1"),
  ],
)
def test_what_does_not_go_with_a_search_is_refused(options, words):
  usual = dict(random={"optim.lr": log_uniform(1e-4, 1e-1)}, samples=20, search=TPE())
  with pytest.raises(UserError, match=words):
    Sweep(**usual | options).settings()


def test_rounds_are_recorded_before_they_train(base, tmp_path, monkeypatch):  # noqa: F811
  options = dict(random={"optim.lr": log_uniform(1e-4, 1e-1)}, samples=5, seeds=(0, 1))
  sweep, file = base(**options, search=TPE(startup=2, batch=2))
  rate = lambda workdir, member, metric: state.State(
    member.steps, {member.steps: member.setting["optim.lr"]}, None
  )
  monkeypatch.setattr(state, "read", rate)
  plan = proposals.plan(sweep, file, (), tmp_path)
  assert len(plan.members) == 4 and plan.missing == 3
  sizes = []
  while plan:
    sizes.append((len(plan.members), plan.missing))
    again = proposals.plan(sweep, file, (), tmp_path)
    assert [m.name for m in again.members] == [m.name for m in plan.members]
    plan = proposals.grown(plan, file, (), tmp_path)
  assert sizes == [(4, 3), (8, 1), (10, 0)]
  other, _ = base(
    **options | dict(random={"optim.lr": uniform(0, 1)}), search=TPE(startup=2, batch=2)
  )
  with pytest.raises(UserError, match="has settings of optim.lr: .*log_uniform"):
    proposals.plan(other, file, (), tmp_path)
  record = tmp_path / proposals.RECORD
  assert len(json.loads(record.read_text())["settings"]) == 5
  record.write_text("{")
  with pytest.raises(UserError, match="is damaged"):
    proposals.plan(sweep, file, (), tmp_path)
