"""The best checkpoint by a metric and the end of a run without improvement, exact on resume."""

import json
import math

import jax.numpy as jnp
import pytest
from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.run import best as best_lib
from jaxgpt.run import checkpoints, metric_writers
from jaxgpt.training import loop
from jaxgpt.training.loop import steps as steps_lib


def test_the_best_is_the_first_with_the_best_value():
  best = best_lib.Best("accuracy", {})
  assert (best.step, best.value, best.since) == (None, None, 0)
  for step, value in ((10, None), (20, 0.5), (30, 0.7), (40, 0.7), (50, math.nan), (40, 0.7)):
    best.add(step, {"loss": 1.0, "accuracy": value})
  assert (best.step, best.value, best.since) == (30, 0.7, 2)


@pytest.mark.parametrize(
  "metric, want", [("loss", 2), ("loss/web", 2), ("mse", 2), ("accuracy", 1), ("task/rougeL", 1),
                   ("task/mean_squared_error", 2), ("bits_per_byte", 2), ("kl", 2),
                   ("wikitext/word_perplexity", 2), ("wikitext/bits_per_byte", 2),
                   ("lambada_openai/perplexity", 2), ("perplexity_task/acc", 1),
                   ("gsm8k/exact_match/strict", 1), ("a/ter/strict", 2), ("a/filter", 1)],
)  # fmt: skip
def test_of_losses_and_errors_less_is_better(metric, want):
  assert best_lib.Best(metric, {1: 0.9, 2: 0.1}).step == want


def test_an_unknown_metric_is_an_error_with_the_names_there_are():
  with pytest.raises(UserError, match=r"checkpoint.best='acuracy': did you mean 'accuracy'\? this"):
    best_lib.Best("acuracy", {}).add(1, {"loss": 1.0, "accuracy": 0.5, "tokens": 3})


def test_the_values_of_a_run_are_those_up_to_its_step(tmp_path):
  lines = [
    {"step": s, "kind": kind, "loss": loss}
    for s, kind, loss in ((4, "validation", 3.0), (4, "train", 0.0), (8, "validation", None),
                          (12, "validation", 1.0))
  ]  # fmt: skip
  (tmp_path / metric_writers.JSONL).write_text(
    "".join(json.dumps(x) + "\n" for x in lines) + '{"st'
  )
  best = best_lib.of_run(tmp_path, "loss", 8)
  assert (best.step, best.value, best.since) == (4, 3.0, 1)


def validations(folder):
  found = [json.loads(line) for line in (folder / metric_writers.JSONL).read_text().splitlines()]
  return {r["step"]: r["loss"] for r in found if r["kind"] == "validation"}


@pytest.mark.slow
def test_a_run_keeps_its_best_weights_ends_early_and_resumes_exactly(tiny, tmp_path, monkeypatch):
  # The rate is so high that the loss rises again.
  c = tiny(
    eval__every=2,
    eval__patience=2,
    checkpoint__best="loss",
    checkpoint__every=2,
    train__steps=40,
    optim__lr=0.2,
    schedule__name="constant",
  )
  whole = loop.train(c, tmp_path / "whole", {})
  losses = validations(tmp_path / "whole")
  step = min(losses, key=losses.get)
  assert whole.early and whole.step == step + 4 < 40 and whole.best == (step, losses[step])
  where = tmp_path / "whole" / best_lib.FOLDER
  assert checkpoints.complete_steps(where) == [step]

  # Killed after several evaluations, one of them the best.
  parts, real = tmp_path / "parts", steps_lib.Run._keep_best

  class Killed(Exception):
    pass

  def killed(run, result, at):
    real(run, result)
    if run._step == at:
      raise Killed

  for at in (step, step + 2):
    monkeypatch.setattr(steps_lib.Run, "_keep_best", lambda run, r, at=at: killed(run, r, at))
    with pytest.raises(Killed):
      loop.train(c, parts, {})
  monkeypatch.undo()
  again = loop.train(c, parts, {})
  assert again[:2] == whole[:2] and again.best == whole.best and again.early
  assert validations(parts) == losses
  assert checkpoints.complete_steps(parts / best_lib.FOLDER) == [step]
  # A run that ended early goes no step further.
  assert loop.train(c, parts, {}).step == whole.step

  run = load.load(parts, "best")
  assert run.step == step
  assert load.evaluate_run(run)["loss"] == pytest.approx(losses[step], rel=1e-6)


def test_a_best_checkpoint_of_a_step_to_come_is_replaced(tmp_path):
  state = {"step": 0, "nonfinite_step": -1, "params": {}}
  with best_lib.keeper(tmp_path, 0) as kept:
    kept.save(state | {"step": 30, "params": {"a": jnp.ones(2)}})
  with best_lib.keeper(tmp_path, 20) as kept:
    kept.save(state | {"step": 20, "params": {"a": jnp.zeros(2)}})
  assert checkpoints.complete_steps(epath.Path(tmp_path) / best_lib.FOLDER) == [20]


def test_without_a_best_checkpoint_step_best_is_an_error(tmp_path):
  with pytest.raises(
    UserError, match=r"--step=best: .* train with --config.checkpoint.best=METRIC"
  ):
    best_lib.check(tmp_path)
  with pytest.raises(UserError, match="--step=last: give the number of a step, or best"):
    best_lib.check(tmp_path, "last")
