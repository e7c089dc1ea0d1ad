"""Where a run goes on, and whether its checkpoints are gone."""

import json
import os

import pytest

from jaxgpt import config
from jaxgpt.commands.checks import workdir
from jaxgpt.commands.checks.finding import PROBLEM, Known
from jaxgpt.errors import UserError
from jaxgpt.run import resume, run_lock


@pytest.fixture
def run(tmp_path):
  """A function (checkpoints, metrics, starts) -> a run folder with `checkpoint.every=10`."""

  def make(steps=(), metrics=(), starts=({},)):
    c = config.resolve(config.base(), vocab_size=264)
    c.checkpoint.every = 10
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": json.loads(c.to_json())}))
    records = [{"data_digest": "d", **start} for start in starts]
    (folder / "starts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for step in steps:
      (folder / "checkpoints" / f"{step}").mkdir(parents=True)
    lines = [json.dumps({"step": step, "kind": "train"}) for step in metrics]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9')
    return folder

  return make


@pytest.mark.parametrize(
  "steps, metrics, starts, line",
  [
    ((), (), (), "starts at step 0 of 40"),
    ((0,), (), ({"step": 0, "saved": 0},), "resumes at step 0 of 40"),
    ((10, 20, "30.orbax-checkpoint-tmp"), (10, 20), ({},), "resumes at step 20 of 40"),
    # Killed before the first checkpoint was complete: the save of step 20 would wait for it.
    (
      (),
      (7, 20),
      ({"step": 0},),
      "starts at step 0 of 40; metrics.jsonl ends at step 20: 20 steps",
    ),
    ((10,), (12,), ({},), "resumes at step 10 of 40; metrics.jsonl ends at step 12: 2 steps"),
    ((40,), (40,), ({"saved": 40},), "all 40 steps are done"),
  ],
)
def test_a_start_says_where_it_goes_on(run, steps, metrics, starts, line):
  assert resume.find(run(steps, metrics, starts)).describe(40).startswith(line)


@pytest.mark.parametrize(
  "metrics, starts",
  [
    ((21,), ({},)),  # of an older version, which noted nothing
    ((4,), ({"step": 0, "saved": 4},)),  # complete after 4 steps
    ((), ({"step": 0}, {"step": 10})),  # its metrics are gone too
  ],
)
def test_a_run_whose_checkpoints_are_gone_is_refused(run, metrics, starts):
  folder = run((), metrics, starts)
  with pytest.raises(UserError, match="whose checkpoints are gone.*restore.*delete.*--workdir"):
    resume.find(folder)


def test_the_interval_of_checkpoints_may_have_grown(run):
  """A start with more steps between checkpoints was killed before its first one."""
  starts = [{"config": {"checkpoint.every": every}} for every in (10, 100)]
  assert resume.find(run((), (21,), starts)).step is None


def said(folder):
  """The findings of doctor on a run folder, by status."""
  return {finding.status: finding.text for finding in workdir.run_folder(folder, Known())}


def test_doctor_says_what_train_would_do(run):
  folder = run((), (4,), ({"step": 0, "saved": 4},))
  assert "whose checkpoints are gone" in said(folder)[PROBLEM]
  (folder / "checkpoints" / "4" / "meta").mkdir(parents=True)
  meta = json.dumps({"step": 4, "nonfinite_step": -1})
  (folder / "checkpoints" / "4" / "meta" / "metadata").write_text(meta)
  assert PROBLEM not in said(folder)
  with run_lock.RunLock(folder) as lock:
    lock.take()
    assert f"process {os.getpid()} on host" in said(folder)[PROBLEM]


def test_a_folder_without_a_run_starts_at_step_0(tmp_path):
  assert resume.find(tmp_path / "new") == (None, 0) and not (tmp_path / "new").exists()
