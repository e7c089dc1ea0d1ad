"""Sweeps: which runs follow from a file, who trains on, and what the table says."""

import json
import math
import shlex
import xml.etree.ElementTree as ET

import pytest

from jaxgpt.analysis.sweep import (
  Halving,
  Sweep,
  choice,
  definition,
  log_uniform,
  members,
  plot,
  schedule,
  state,
  table,
  uniform,
)
from jaxgpt.analysis.sweep.members import Member, Plan
from jaxgpt.analysis.sweep.state import Failure, State
from jaxgpt.errors import UserError


@pytest.fixture
def base(tiny, tmp_path, corpus):
  """A function (options of a Sweep) -> (sweep, path of a sweep file with a config)."""
  (tmp_path / "base.py").write_text(
    "from jaxgpt import config\n"
    "def get_config():\n"
    "  c = config.base()\n"
    "  c.model.update(dict(num_layers=1, width=16, num_heads=2))\n"
    f"  c.data.update(dict(path={str(corpus)!r}, seq_len=32))\n"
    "  c.schedule.warmup_steps = 2\n"
    "  c.train.steps = 8\n"
    "  c.eval.every = 4\n"
    "  return c\n"
  )
  return lambda **options: (Sweep(base="base.py", **options), str(tmp_path / "sweep.py"))


def test_settings_are_the_product_of_all_parts():
  sweep = Sweep(
    points=({"optim.b1": 0.9}, {"optim.b1": 0.8}),
    grid={"optim.lr": (1e-3, 1e-2), ("model.width", "model.num_heads"): ((16, 2), (32, 4))},
    random={"optim.b2": uniform(0.9, 0.99), "model.activation": choice("gelu", "relu")},
    samples=3,
  )
  settings = sweep.settings()
  assert len(settings) == 2 * 2 * 2 * 3 and settings == sweep.settings()
  assert {(s["model.width"], s["model.num_heads"]) for s in settings} == {(16, 2), (32, 4)}
  assert all(0.9 <= s["optim.b2"] <= 0.99 for s in settings)
  draws = Sweep(random={"optim.lr": log_uniform(1e-5, 1e-1)}, samples=200).settings()
  assert 0.4 < sum(s["optim.lr"] < 1e-3 for s in draws) / 200 < 0.6


@pytest.mark.parametrize(
  "options, words",
  [
    (dict(grid={"optim.lrr": (1,)}), "unknown config key 'optim.lrr'; did you mean 'optim.lr'"),
    (dict(grid={"seed": (1, 2)}), "seeds="),
    (dict(grid={"optim.lr": ()}), "no value for 'optim.lr'"),
    (dict(grid={"optim.lr": (1e-3, 1e-3)}), "occurs twice"),
    (dict(grid={("optim.lr", "optim.b1"): (1e-3,)}), "must have a value for each"),
    (dict(grid={"optim.lr": (1e-3,)}, fixed={"optim.lr": 1}), "values in two places"),
    (dict(random={"optim.lr": uniform(0, 1)}), "samples=N go together"),
    (dict(random={"optim.name": choice("adamw", "lion")}, samples=3), "only 2 different"),
    (dict(seeds=(1, 1)), "different numbers"),
    (dict(halving=Halving(steps=(4, 2))), "must be rising"),
  ],
)
def test_a_definition_that_does_not_fit_is_refused(options, words):
  with pytest.raises(UserError, match=words):
    Sweep(**options).settings()


def test_runs_have_names_and_checked_configs(base):
  plan = members.plan(*base(grid={"optim.lr": (1e-3, 1e-2)}, seeds=(0, 1)))
  assert [m.name for m in plan.members] == [
    "lr=0.001,seed=0",
    "lr=0.001,seed=1",
    "lr=0.01,seed=0",
    "lr=0.01,seed=1",
  ]
  assert plan.members[3].overrides == ("--config.optim.lr=0.01", "--config.seed=1")
  assert plan.members[0].steps == 8
  with pytest.raises(UserError, match="run width=15,seed=0: model.num_heads=2 does not divide"):
    members.plan(*base(grid={"model.width": (16, 15)}))
  with pytest.raises(UserError, match="run adam_lr=0.1,seed=0: optim.adam_lr=0.1 has no effect"):
    members.plan(*base(grid={"optim.adam_lr": (0.1,)}))
  with pytest.raises(UserError, match="no multiple of eval.every=4"):
    members.plan(*base(halving=Halving(steps=(3,))))
  with pytest.raises(UserError, match="must be below train.steps=8"):
    members.plan(*base(halving=Halving(steps=(8,))))
  with pytest.raises(UserError, match="the sweep gives 'optim.lr' itself"):
    members.plan(*base(grid={"optim.lr": (1e-3,)}), ["--config.optim.lr=1"])


def test_files_that_are_no_sweeps_are_refused(tmp_path):
  file = tmp_path / "x.py"
  with pytest.raises(UserError, match="no such file"):
    definition.load(file)
  file.write_text("def get_config(): pass\n")
  with pytest.raises(UserError, match="no get_sweep"):
    definition.load(file)
  file.write_text("def get_sweep():\n  return 1 / 0\n")
  with pytest.raises(UserError, match="x.py:2: ZeroDivisionError"):
    definition.load(file)


def plan_of(losses, **options):
  """A plan of settings lr=0, 1, …, and states with given {step: loss} of each setting and seed."""
  seeds = range(len(losses[0]))
  sweep = Sweep(seeds=tuple(seeds), **options)
  runs = [
    Member(f"lr={i},seed={seed}", {"optim.lr": float(i + 1)}, i, seed, (f"lr={i}", "seed"), 8)
    for i in range(len(losses))
    for seed in seeds
  ]
  states = {
    f"lr={i},seed={seed}": found
    if isinstance(found, State)
    else State(max(found, default=0), found, None)
    for i, of_setting in enumerate(losses)
    for seed, found in enumerate(of_setting)
  }
  return Plan(sweep, "base.py", runs, []), states


def test_the_worst_settings_end_early_and_failures_count_as_worst():
  failed = State(2, {}, Failure(state.DIVERGED, "step 3 is not finite"))
  losses = [[{4: 3.0}, {4: 1.0}], [{4: 2.0}, {4: 1.5}], [failed, failed], [{4: 5.0}, {4: 6.0}]]
  plan, states = plan_of(losses, halving=Halving(steps=(4,), keep=0.5))
  assert schedule.going_on(plan, states) == [[0, 1, 2, 3], [0, 1]]
  assert [(job.member.number, job.until) for job in schedule.jobs(plan, states, 1)] == [
    (0, 8),
    (0, 8),
    (1, 8),
    (1, 8),
  ]
  assert not schedule.jobs(plan, states, 0)
  states["lr=3,seed=0"] = State(0, {}, None)  # not known yet: nobody ends
  assert schedule.going_on(plan, states)[1] == [0, 1, 2, 3]
  assert [job.member.name for job in schedule.jobs(plan, states, 0)] == ["lr=3,seed=0"]


def test_table_and_plot():
  failed = State(2, {4: 9.0}, Failure(state.BROKEN, "no data"))
  done = lambda x: {4: x + 1, 8: x}
  losses = [[done(3.0), done(1.0), done(2.0)], [done(0.5), done(0.75), failed], [{4: 7.0}] * 3]
  plan, states = plan_of(losses, halving=Halving(steps=(4,), keep=0.6))
  found = table.make(plan, states)
  first, second, third = found.rows
  assert (first.median, first.low, first.high, first.note) == (
    0.625,
    0.5,
    0.75,
    "1 failed, probability 50%",
  )
  assert (second.median, second.low, second.high, second.note) == (2.0, 1.0, 3.0, "")
  assert (third.median, third.step, third.note) == (7.0, 4, table.ENDED)
  assert found.is_complete and found.flags == ["lr=1"] and found.coverage == 0.75
  assert set(found.failures) == {"lr=1,seed=2"}
  text = table.lines(found)
  assert text[0].split() == ["lr", "step", "seeds", "loss", "interval"]
  assert text[1].split()[:3] == ["2.0", "8", "2"] and "probability 75%" in text[4]
  assert json.loads(json.dumps(table.to_json(found)))["rows"][1]["values"]["1"] == 1.0
  states["lr=0,seed=1"] = State(4, {4: 2.0}, None)
  found = table.make(plan, states)
  assert not found.is_complete and "1 not done" in [row.note for row in found.rows]
  key = plot.axis_key(found)
  root = ET.fromstring(plot.svg(found, key))
  assert len(root.findall(".//{*}circle")) == 1 and key == "optim.lr", "that of the end"
  with pytest.raises(UserError, match="--x=seed: not a key of this sweep"):
    plot.axis_key(found, "seed")


def test_runs_that_diverge_and_metrics_that_are_no_number_count_as_the_worst():
  """In the table as in the ranking of halving, and in whatever order the seeds come."""
  diverged = State(2, {}, Failure(state.DIVERGED, "step 3 is not finite"))
  steady = [{8: 3.0}, {8: 3.1}, {8: 3.2}]
  for lucky in ([{8: 2.9}, diverged, diverged], [{8: math.nan}, {8: 2.9}, {8: math.nan}]):
    plan, states = plan_of([lucky, steady])
    found = table.make(plan, states)
    assert [row.median for row in found.rows] == [3.1, math.inf]
    assert found.flags == ["lr=1"] and schedule.ranked(plan, states, [0, 1], 8) == [1, 0]
    assert "[2.9000, not finite]" in table.lines(found)[2]
  one, other = ({8: 0.5}, {8: math.nan}, {8: 0.3}), ({8: math.nan}, {8: 0.5}, {8: 0.3})
  for maximize, median in ((False, 0.5), (True, 0.3)):
    plan, states = plan_of([one, other], maximize=maximize)
    rows = table.make(plan, states).rows
    assert [row.median for row in rows] == [median] * 2 and rows[0].low == rows[1].low
    root = ET.fromstring(plot.svg(table.make(plan, states), "optim.lr"))
    assert len(root.findall(".//{*}circle")) == 2, "intervals without an end do not hinder it"
  plan, states = plan_of([[{8: 0.0}]])
  assert table.make(plan, states).flags == ["lr=0"], "0 is a number"
  plan, states = plan_of([[diverged] * 2])
  assert (
    not table.make(plan, states).flags and "not finite" in table.lines(table.make(plan, states))[1]
  )


def test_the_plot_compares_settings_at_the_end():
  waiting = State(4, {4: 1.0}, None)
  plan, states = plan_of(
    [[{4: 3.0, 8: 2.0}], [{4: 4.0, 8: 3.0}], [waiting]], halving=Halving(steps=(4,), keep=1.0)
  )
  found = plot.svg(table.make(plan, states), "optim.lr")
  assert len(ET.fromstring(found).findall(".//{*}circle")) == 2 and "1 settings without" in found


def test_the_command_of_the_best_setting_can_be_pasted():
  plan, states = plan_of([[{8: 1.0}]])
  flag = "--config.model.attention_pattern=('global',)"
  plan = plan._replace(members=[plan.members[0]._replace(overrides=(flag, "seed"))])
  command = table.lines(table.make(plan, states))[-1].removeprefix("best: ")
  assert shlex.split(command)[3] == flag


def test_random_values_stay_in_their_range_and_differ():
  narrow = Sweep(random={"optim.b2": uniform(0.999, 0.99999)}, samples=50).settings()
  assert all(0.999 <= s["optim.b2"] <= 0.99999 for s in narrow)
  assert all(len(str(s["optim.b2"])) <= 9 for s in narrow), "and have few digits"


def test_an_evaluation_without_the_metric_has_no_number_there(tmp_path):
  member = Member("lr=1", {}, 0, 0, (), 8)
  folder = members.folder_of(tmp_path, member)
  folder.mkdir(parents=True)
  (folder / "config.json").write_text("{}")
  records = [{"step": 4, "kind": "validation", "loss": 1.0}]
  records += [{"step": 8, "kind": "validation", "loss": 1.0, "accuracy": 0.5}]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  values = state.read(tmp_path, member, "accuracy").values
  assert math.isnan(values[4]) and values[8] == 0.5
  with pytest.raises(UserError, match="metric='acuracy': did you mean 'accuracy'"):
    state.read(tmp_path, member, "acuracy")


@pytest.mark.parametrize(
  "n, low, high, coverage",
  [(1, 0, 0, 0.0), (3, 0, 2, 0.75), (6, 0, 5, 0.96875), (10, 1, 8, 0.9785)],
)
def test_intervals_are_those_of_order_statistics(n, low, high, coverage):
  found = table.interval([float(i) for i in range(n)])
  assert found[:2] == (low, high) and math.isclose(found[2], coverage, abs_tol=1e-4)
