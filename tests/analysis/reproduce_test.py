"""A run is trained again from its folder, and a step of it is computed again."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.analysis import curves, replay, reproduce
from jaxgpt.errors import UserError
from jaxgpt.run import run_folder
from jaxgpt.run.provenance import environment
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import loop, schedules


def test_it_is_identical_to_the_bit(trained, tmp_path, capsys):
  found = reproduce.reproduce(trained, tmp_path / "again", steps=5)
  assert found.is_identical and found.checkpoints == [4] and found.steps == 5
  assert found.curves.records == 6 and not found.environment
  text = "\n".join(reproduce.lines(found, trained))
  assert text.startswith(
    "identical to the bit for 5 steps: 6 records of metrics and the checkpoint"
  )
  assert "the environment is the same" in text


def test_it_names_the_first_step_and_array_that_differ(trained, tmp_path, monkeypatch):
  plain = schedules.make

  def changed(c):
    factor = plain(c)
    return lambda step: factor(step) * jnp.where(step == 2, 1.5, 1.0)

  monkeypatch.setattr(schedules, "make", changed)
  sources = environment._sources() | {"jaxgpt/training/schedules.py": "0"}
  monkeypatch.setattr(environment, "_sources", lambda: sources)
  found = reproduce.reproduce(trained, tmp_path / "again", steps=4)
  assert not found.is_identical
  assert (found.curves.before, found.curves.first_difference.step) == (2, 3)
  assert found.arrays.step == 4
  assert {c.name for c in found.arrays.changes} >= {"params/embed"}
  text = "\n".join(reproduce.lines(found, trained))
  assert "NOT identical" in text and "train lr at step 3" in text
  assert "first checkpoint that differs: step 4" in text
  assert "code: jaxgpt/training/schedules.py differs" in text


def test_a_repetition_of_other_code_proves_nothing(trained, tmp_path, monkeypatch):
  found = reproduce.reproduce(trained, tmp_path / "again", steps=2)
  assert found.is_identical and not any("already" in note for note in found.notes)
  found = reproduce.reproduce(trained, tmp_path / "again", steps=2)
  assert "had 2 of these steps already: they were not trained now" in found.notes[0]
  shutil.copytree(trained, tmp_path / "copy")
  with pytest.raises(UserError, match="is a copy of the run"):
    reproduce.reproduce(trained, tmp_path / "copy", steps=2)
  sources = environment._sources() | {"jaxgpt/training/schedules.py": "0"}
  monkeypatch.setattr(environment, "_sources", lambda: sources)
  with pytest.raises(UserError, match="another environment than this one .*schedules.py"):
    reproduce.reproduce(trained, tmp_path / "again", steps=2)


def test_what_cannot_be_reproduced_is_refused(trained, tmp_path):
  with pytest.raises(UserError, match="the run has done 8 steps"):
    reproduce.settings(trained, 9)
  with pytest.raises(UserError, match="is the run itself"):
    reproduce.reproduce(trained, trained)
  shutil.copytree(trained, tmp_path / "run")
  path = tmp_path / "run" / "starts.jsonl"
  record = json.loads(path.read_text())
  path.write_text(json.dumps(record | {"data_digest": "0" * 64}) + "\n")
  with pytest.raises(UserError, match="is not the data of"):
    reproduce.settings(tmp_path / "run")


@pytest.fixture(scope="module")
def step(trained):
  return replay.replay(trained, 5)


def test_a_replay_has_the_logged_metrics(trained, step):
  logged = curves.read(trained)["train", 6]
  assert step.begun == 4 and step.window == (5, 5) and step.unequal() == []
  assert step.again["loss"] == logged["loss"] and step.again["grad_norm"] == logged["grad_norm"]
  assert "identical to the bit to the record of step 5" in "\n".join(replay.lines(step, trained))
  differs = step._replace(logged=logged | {"loss": 0.0})
  assert differs.unequal() == ["loss"]
  assert "DIFFERS" in "\n".join(replay.lines(differs, trained))


@pytest.mark.slow
def test_a_replay_knows_the_log_windows_of_each_start(tiny, tmp_path):
  run = tmp_path / "run"
  for every, until in ((1, 2), (4, 4)):
    c = tiny(log__every=every, checkpoint__every=2, train__steps=4, optim__lr=0.01 / every)
    loop.train(c, run, config.flatten(c), until=until, accept_changes=True)
  for step, window in ((1, (1, 1)), (3, (2, 3))):
    found = replay.replay(run, step)
    assert found.window == window and found.unequal() == [] and found.logged
  (run / "config_before_2.json").rename(run / "config_before_3.json")  # within a window
  text = "\n".join(replay.lines(replay.replay(run, 2), run))
  assert "the config changed at step 3, before the end of the log window" in text


@pytest.mark.slow
def test_a_replay_leaves_out_a_step_that_was_skipped(tiny, tmp_path, monkeypatch):
  """The metrics of step 3, whose loss is not finite, are in no mean of the log."""
  make, taken = batches_lib.to_devices, []

  def to_devices(batch, mesh):
    taken.append(1)
    if len(taken) == 4:
      batch = batch | {"loss_weights": np.full_like(batch["loss_weights"], np.nan)}
    return make(batch, mesh)

  monkeypatch.setattr(batches_lib, "to_devices", to_devices)
  c = tiny(optim__skip_nonfinite=1, log__every=3, train__steps=6)
  loop.train(c, tmp_path / "run", config.flatten(c))
  taken.clear()
  found = replay.replay(tmp_path / "run", 4)
  text = "\n".join(replay.lines(found, tmp_path / "run"))
  assert "identical to the bit" in text and "DIFFERS" not in text, text


def test_a_replay_has_the_loss_of_each_document(step):
  weights = np.array([e.predictions for e in step.examples])
  losses = np.array([e.loss for e in step.examples])
  assert weights.sum() == step.metrics["tokens"]
  assert (weights * losses).sum() / weights.sum() == pytest.approx(step.metrics["nll"], rel=1e-5)
  assert all(e.name.endswith(".txt") and e.start < e.end for e in step.examples)
  assert {e.row for e in step.examples} == set(range(8))


def test_a_replay_has_the_gradient_norm_of_each_layer(step):
  assert list(step.norms)[:2] == ["layer 0", "layer 1"] and "embed" in step.norms
  total = np.sqrt(sum(norm**2 for norm in step.norms.values()))
  assert total == pytest.approx(step.metrics["grad_norm"], rel=1e-5)


def test_steps_that_are_not_there_are_refused(trained):
  with pytest.raises(UserError, match="the steps of this run are 0 to 7"):
    replay.replay(trained, 8)


def test_a_run_whose_config_changed_is_repeated_until_then(trained, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(trained, run)
  text = (run / "config.json").read_text()
  (run / "config_before_4.json").write_text(text.replace('"lr": 0.01', '"lr": 0.03'))
  c, _, until = reproduce.settings(run)
  assert (c.optim.lr, until) == (0.03, 4)
  assert run_folder.read_config(run, 3).optim.lr == 0.03
  assert run_folder.read_config(run, 4).optim.lr == 0.01
  with pytest.raises(UserError, match="changed at step 4"):
    reproduce.settings(run, 5)
  (note,) = reproduce.compare(run, trained, 4).notes
  assert "changed at step 4" in note
