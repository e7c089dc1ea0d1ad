"""Each objective is learned by the same step and loop, from files to an evaluated run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.inference import load
from jaxgpt.training import loop, objectives


def train(tiny, folder, path, objective, **fields):
  fields = dict(train__steps=30) | fields
  c = tiny(data__path=path, objective__name=objective, log__every=10, **fields)
  loop.train(c, folder, {})
  return load.evaluate_run(load.load(folder))


@pytest.mark.slow
def test_masked_words_are_learned(tiny, data, tmp_path):
  result = train(tiny, tmp_path / "run", data("text"), "masked_lm", model__causal=False)
  assert result["loss"] < 4 and "bits_per_byte" not in result


@pytest.mark.slow
def test_classes_are_learned(tiny, data, tmp_path):
  result = train(
    tiny,
    tmp_path / "run",
    data("classification"),
    "classification",
    model__causal=False,
    model__head="classifier",
    model__num_labels=6,
    model__head_transform="tanh",
    model__pooling="mean",
    train__steps=150,
  )
  assert result["accuracy"] > 0.9 and result["tokens"] > 10 and "perplexity" not in result


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seq2seq", "chat"])
def test_answers_are_learned(tiny, data, tmp_path, kind):
  result = train(tiny, tmp_path / "run", data(kind), "causal_lm")
  assert result["loss"] < 2.5 and "bits_per_byte" not in result


@pytest.mark.slow
def test_preferences_are_learned_by_adapters(tiny, data, tmp_path):
  c = tiny(
    data__path=data("preference"), objective__name="preference", train__steps=30, log__every=1
  )
  c.model.lora.update(dict(rank=4, targets=("*",)))
  loop.train(c, tmp_path / "run", {})
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
  first = next(line for line in lines if line.get("kind", "train") == "train")
  assert first["loss"] == pytest.approx(np.log(2), abs=1e-3), "adapters start as nothing"
  assert load.evaluate_run(load.load(tmp_path / "run"))["accuracy"] > 0.9


def test_a_regression_is_a_squared_error():
  class Model:
    cfg = config.base().model
    largest_logits = False

    def apply(self, params, tokens, *args, **kwargs):
      del params, args, kwargs

      class Out:
        logits, router = tokens[:, :1] * 1.0, None

      return Out

  Model.cfg.num_labels = 1
  batch = {
    "tokens": jnp.array([[1], [2]]),
    "positions": None,
    "segment_ids": None,
    "labels": jnp.array([1.5, 4.0]),
    "loss_weights": jnp.ones(2),
  }
  loss, weight, aux = objectives.OBJECTIVES["classification"].loss_fn(Model(), None)(
    {}, None, batch, jax.random.key(0)
  )
  assert (loss, weight) == (0.25 + 4, 2) and "correct" not in aux
  assert (aux["mse"], aux["mae"]) == (0.25 + 4, 0.5 + 2)
