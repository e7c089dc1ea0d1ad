import json
import math

import pytest

from jaxgpt import config
from jaxgpt.training import metrics


def resolved(preset):
  c = config.base()
  c.model.update(config.preset(preset))
  return config.resolve(c).model


def test_flops_of_gpt2_are_six_times_its_matmul_weights_and_the_attention():
  weights = 12 * 12 * 768**2 + 50257 * 768
  attention = 2 * 12 * 1024 * 768
  assert metrics.flops_per_token(resolved("gpt2_124m"), 1024) == 6 * (weights + attention)


def test_an_untied_embedding_is_a_lookup_and_no_matmul():
  c = resolved("llama3_8b")
  weights = 8_030_261_248 - 128256 * 4096 - 65 * 4096
  assert metrics.flops_per_token(c, 8192) == 6 * (weights + 2 * 32 * 8192 * 4096)


def test_a_window_counts_on_both_sides_without_a_causal_mask():
  c = resolved("llama3_8b")
  of_rows = metrics.flops_per_token(c, 8192)
  c.attention_pattern, c.window = ("local", "global"), 1024
  of_keys = lambda saved: 6 * 2 * 16 * saved * 4096  # 16 local layers
  assert metrics.flops_per_token(c, 8192) == of_rows - of_keys(8192 - 1024)
  c.causal = False
  assert metrics.flops_per_token(c, 8192) == of_rows - of_keys(8192 - 2047)
  assert metrics.flops_per_token(c, 1024) == of_rows - 2 * of_keys(8192 - 1024)


def test_bits_per_byte():
  assert metrics.bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)
  assert metrics.perplexity(1e6) == math.inf


def test_means_are_weighted_by_tokens_and_survive_json():
  means = metrics.Means()
  means.add({"loss": 1.0, "tokens": 30.0, "grad_norm": 1.0, "lr": 0.1, "param_norm": 5.0})
  state = means.state()
  means.add({"loss": 9.0, "tokens": 9.0, "grad_norm": 9.0, "lr": 9.0, "param_norm": 9.0})
  assert state["sums"]["tokens"] == 30.0, "the saved state is a copy"
  means = metrics.Means(**json.loads(json.dumps(state)))
  means.add({"loss": 3.0, "tokens": 10.0, "grad_norm": 3.0, "lr": 0.2, "param_norm": 6.0})
  assert means.take() == {
    "loss": 1.5,
    "tokens": 40.0,
    "grad_norm": 2.0,
    "lr": 0.2,
    "param_norm": 6.0,
  }
  means.add({"loss": 7.0, "tokens": 1.0, "grad_norm": 1.0, "lr": 0.1, "param_norm": 5.0})
  assert means.take()["loss"] == 7.0


def test_skipped_steps_are_counted_and_change_no_mean():
  means = metrics.Means()
  means.add({"loss": 2.0, "tokens": 10.0, "grad_norm": 1.0})
  means.add_skipped()
  means = metrics.Means(**means.state())
  means.add_skipped()
  assert means.take() == {"loss": 2.0, "grad_norm": 1.0, "tokens": 10.0, "skipped_steps": 2.0}
  means.add_skipped()
  assert means.take() == {"tokens": 0.0, "skipped_steps": 1.0}
  assert means.take() == {"tokens": 0.0}


def test_means_that_are_not_finite_survive_json_too():
  means = metrics.Means()
  means.add({"loss": 1.0, "margin": math.inf, "tokens": 30.0, "lr": math.nan})
  text = json.dumps(means.state(), allow_nan=False)
  found = metrics.Means(**json.loads(text)).take()
  assert found["margin"] == math.inf and math.isnan(found["lr"]) and found["loss"] == 1.0
