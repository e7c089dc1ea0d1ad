"""Runs with a reference or a teacher: saved once, stored ahead, resumed, evaluated, on any mesh."""

import json
import os
import shutil
import signal

import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import loop


def losses(folder):
  """[(loss, nll)] of the training steps of a run."""
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
  return [(x["loss"], x["nll"]) for x in lines if x["kind"] == "train"]


def stopping_after(monkeypatch, steps):
  """Sends SIGTERM when the batch of a step goes to the devices."""
  original, count = batches_lib.to_devices, 0

  def counting(batch, mesh):
    nonlocal count
    count += 1
    if count == steps:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(batch, mesh)

  monkeypatch.setattr(batches_lib, "to_devices", counting)
  return lambda: monkeypatch.setattr(batches_lib, "to_devices", original)


def interrupted_at(batch):
  """A `to_devices` that raises an error at the given batch."""
  original, count = batches_lib.to_devices, 0

  def to_devices(*args):
    nonlocal count
    count += 1
    if count == batch:
      raise InterruptedError
    return original(*args)

  return to_devices


@pytest.fixture(scope="module")
def preferred(tiny, data, tmp_path_factory):
  """(config, run folder) of DPO of all parameters, with the reference in memory."""
  c = tiny(data__path=data("preference"), objective__name="preference", train__steps=6)
  folder = tmp_path_factory.mktemp("preferred") / "run"
  loop.train(c, folder, {})
  return c, folder


@pytest.mark.slow
def test_all_parameters_learn_to_prefer(preferred):
  _, folder = preferred
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
  first, last = lines[0], lines[-1]
  assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and first["kl"] == 0
  assert last["kind"] == "validation" and last["accuracy"] > 0.9
  assert last["margin"] > 0.1 and last["kl"] > 0
  result = load.evaluate_run(load.load(folder))
  assert {k: result[k] for k in ("margin", "kl", "loss")} == {
    k: pytest.approx(last[k], rel=1e-5) for k in ("margin", "kl", "loss")
  }
  run = load.load(folder, use="generate")
  assert not run.fixed and "reference" not in run.params


@pytest.mark.slow
def test_stored_likelihoods_train_the_same_run_and_it_goes_on(
  preferred, tiny, tmp_path, monkeypatch
):
  c, folder = preferred
  c = c.copy_and_resolve_references()
  c.objective.stored = str(tmp_path / "stored")
  with monkeypatch.context() as patch, pytest.raises(InterruptedError):
    patch.setattr(batches_lib, "to_devices", interrupted_at(3))
    loop.train(c, tmp_path / "run", {})
  assert not (tmp_path / "stored" / "stored.json").exists(), "computed in part"
  undo = stopping_after(monkeypatch, 19)  # 16 batches are read before the first step
  assert loop.train(c, tmp_path / "run", {}).stopped
  undo()
  before = {f: f.stat().st_mtime_ns for f in (tmp_path / "stored").iterdir()}
  outcome = loop.train(c, tmp_path / "run", {})
  assert outcome.step == 6 and "kl" not in outcome.result
  assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "stored").iterdir()}
  np.testing.assert_allclose(losses(tmp_path / "run"), losses(folder), rtol=1e-5)
  assert not (tmp_path / "run" / "reference").exists()
  result = load.evaluate_run(load.load(tmp_path / "run"))
  assert result["margin"] == pytest.approx(outcome.result["margin"], rel=1e-5)

  about = tmp_path / "stored" / "stored.json"
  whole = about.read_text()
  about.write_text(json.dumps(json.loads(whole) | {"model": "another"}))
  with pytest.raises(UserError, match="has numbers of model 'another', but the run in .* has"):
    load.load(tmp_path / "run", use="evaluate")
  about.write_text(whole)
  c.seed = 1  # other weights
  with pytest.raises(UserError, match=r"has numbers of model .*; name an empty folder"):
    loop.train(c, tmp_path / "other", {})
  shutil.rmtree(tmp_path / "stored")
  with pytest.raises(UserError, match="cannot be read .*; restore the folder"):
    c.seed = 0
    loop.train(c, tmp_path / "run", {})


@pytest.mark.slow
def test_a_student_learns_from_a_teacher_in_memory_or_stored(
  tiny, teacher_run, tmp_path, monkeypatch
):
  keys = dict(objective__name="distillation", objective__teacher=str(teacher_run))
  live = tiny(**keys, train__steps=4)
  undo = stopping_after(monkeypatch, 2)
  assert loop.train(live, tmp_path / "live", {}).stopped
  undo()
  moved = teacher_run.rename(teacher_run.with_name("elsewhere"))  # the run has its own copy
  try:
    result = loop.train(live, tmp_path / "live", {}).result
    assert result["kl"] > 0 and result["perplexity"] > 1 and "bits_per_byte" in result
    again = load.evaluate_run(load.load(tmp_path / "live"))
    assert again["kl"] == pytest.approx(result["kl"], rel=1e-5)
  finally:
    moved.rename(teacher_run)
  ahead = tiny(
    **keys,
    train__steps=4,
    objective__stored=str(tmp_path / "stored"),
    objective__top_k=263,
  )
  result = loop.train(ahead, tmp_path / "ahead", {}).result
  assert "kl" not in result, "no numbers of the validation split are stored"
  np.testing.assert_allclose(losses(tmp_path / "ahead"), losses(tmp_path / "live"), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [dict(data=2, fsdp=2, tensor=2)])
def test_eight_devices_train_as_one(preferred, tiny, data, tmp_path, axes):
  """The session's runs are on eight devices as data shards; one device and other axes agree."""
  _, folder = preferred
  c = tiny(data__path=data("preference"), objective__name="preference", train__steps=6)
  c.mesh.update(dict(data=1) | axes)
  loop.train(c, tmp_path / "run", {})
  np.testing.assert_allclose(losses(tmp_path / "run"), losses(folder), rtol=2e-4)


@pytest.mark.slow
def test_a_run_of_stages_goes_on_in_any_of_them(tiny, tmp_path, monkeypatch, capsys):
  keys = dict(data__stages=((2, 8, 16), (2, 16, 16)), train__steps=6, eval__batch_size=8)
  whole = loop.train(tiny(**keys), tmp_path / "whole", {})
  told = capsys.readouterr().out
  assert "step 2: compiling for 16 x 16 tokens" in told and "step 4: compiling for 8 x 32" in told
  undo = stopping_after(monkeypatch, 3)
  assert loop.train(tiny(**keys), tmp_path / "run", {}).step == 3
  undo()
  assert loop.train(tiny(**keys), tmp_path / "run", {}).result == whole.result
  assert losses(tmp_path / "run") == losses(tmp_path / "whole")
  lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").open()]
  tokens = [x["tokens"] for x in lines if x["kind"] == "train"]
  assert all(n <= most for n, most in zip(tokens, (128, 128, 256, 256, 256, 256)))
  assert min(tokens[2:]) > 128, "rows of 16 x 16 and 8 x 32 are full"
