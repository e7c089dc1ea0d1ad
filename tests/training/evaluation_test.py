"""Bits per byte count each prediction of a split once, whatever the batch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.data import pipeline
from jaxgpt.data.batch_source import Batching
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.text.prepare import prepare
from jaxgpt.training import evaluation


def one_device():
  return mesh_lib.make(config.base().mesh, jax.devices()[:1])


def uniform(params, frozen, batch, key):
  """An objective that finds each of 256 bytes equally likely."""
  del params, frozen, key
  nll = (math.log(256) * batch["loss_weights"]).sum()
  return nll, batch["loss_weights"].sum(), {"nll": nll}


@pytest.mark.parametrize("batch_size, seq_len", [(4, 32), (7, 50), (64, 16)])
def test_a_uniform_model_of_bytes_needs_eight_bits_and_the_end_of_each_document(
  corpus, batch_size, seq_len
):
  data = pipeline.make(corpus, "validation", Batching(seq_len=seq_len, batch_size=batch_size))
  result = evaluation.evaluate(
    evaluation.make_step(uniform, one_device()),
    None,
    data.epoch_batches(),
    evaluation.bytes_per_token(data),
  )
  split = data.sources[0].split
  assert result["tokens"] == split.bytes + split.num_documents
  assert result["bits_per_byte"] == pytest.approx(
    8 * (1 + split.num_documents / split.bytes), rel=1e-5
  )
  assert result["perplexity"] == pytest.approx(256, rel=1e-4)


def test_sums_are_exact_beyond_what_float32_counts():
  ones = {"loss_weights": jnp.ones(4097)}
  step = lambda params, batch: {
    "tokens": batch["loss_weights"].sum(),
    "nll": jnp.float32(0.5) * batch["loss_weights"].sum(),
  }
  result = evaluation.evaluate(step, None, [ones] * 5000, 1.0)
  assert result["tokens"] == 4097 * 5000 > 2**24
  assert result["loss"] == 0.5


def test_no_batch_is_no_crash():
  result = evaluation.evaluate(evaluation.make_step(uniform, one_device()), None, [], 1.0)
  assert result["tokens"] == 0 and np.isfinite(result["loss"])


def test_sources_are_reported_each_and_together(corpus, tmp_path):
  (tmp_path / "a.txt").write_text("\n".join(f"line {i} of {i * i}" for i in range(900)))
  prepare.prepare(tmp_path / "a.txt", tmp_path / "other", tokenizer="bytes", validation=0.3)
  c = config.base().data
  data = pipeline.make(
    f"{corpus},{tmp_path / 'other'}", "validation", Batching(seq_len=40, batch_size=8)
  )

  def step(params, batch):  # a model that knows words by their lengths
    del params
    nll = (batch["positions"] % 7 * batch["loss_weights"]).sum()
    return {"tokens": batch["loss_weights"].sum(), "nll": nll}

  mesh = mesh_lib.make(config.base().mesh)
  result = evaluation.evaluate_on(data, mesh, c, step, None)
  whole = evaluation.evaluate(step, None, data.epoch_batches(), evaluation.bytes_per_token(data))
  for key, value in whole.items():
    assert result[key] == pytest.approx(value, rel=1e-9), key
  parts = data.by_source()
  for name, part in parts.items():
    one = evaluation.evaluate(step, None, part.epoch_batches(), evaluation.bytes_per_token(part))
    assert result[f"loss/{name}"] == pytest.approx(one["loss"])
  assert result["loss/data"] != result["loss/other"]
  assert "loss/data" not in evaluation.evaluate_on(data, mesh, c, step, None, limit=1)


def test_a_regression_has_errors_and_no_perplexity():
  """exp of a squared error means nothing, and here it is too large for JSON."""
  labels = np.array([100.5, 99.5, 0.0])
  step = evaluation.make_step(
    lambda params, frozen, batch, key: (
      0.0,
      batch["w"].sum(),
      {
        "nll": (batch["y"] ** 2 * batch["w"]).sum(),
        "mse": (batch["y"] ** 2 * batch["w"]).sum(),
        "mae": (jnp.abs(batch["y"]) * batch["w"]).sum(),
      },
    ),
    one_device(),
  )
  batch = {"y": jnp.array(labels), "w": jnp.array([1.0, 1.0, 0.0])}
  result = evaluation.evaluate(step, None, [batch], None, per_token=False)
  assert result == {"loss": 10000.25, "mse": 10000.25, "mae": 100.0, "tokens": 2}
  said = evaluation.describe(result)
  assert said == (
    "loss 10000.2500, mean squared error 10000.2500, mean absolute error 100.0000, 2 predictions"
  )
  both = evaluation.combined({"a": (result, None), "b": (result | {"mae": 50.0}, None)})
  assert both["mae"] == 75.0 and "perplexity" not in both


def test_a_metric_that_was_not_finite_is_left_out_of_the_summary():
  assert evaluation.describe({"loss": 800.0, "perplexity": None, "tokens": 3}) == (
    "loss 800.0000, 3 predictions"
  )
