"""Verdicts of the parity certificate."""

import math
import re

import jax
import pytest

from jaxgpt.commands.actions import import_export
from jaxgpt.hf import parity
from jaxgpt.inference import load

NEAR, FAR = ({"max_abs": x, "mean_abs": 0.0, "scale": 5.0} for x in (1e-5, 1e-2))
GOOD = {
  "checked": True,
  "tokenizer": {"equal": True, "why_not": ""},
  "logits": NEAR,
  "layers": [NEAR, NEAR],
  "greedy": {"equal": True},
}


@pytest.mark.parametrize(
  "values,message",
  [
    ({"logits": FAR, "layers": [NEAR, FAR]}, "outputs differ .* by 1.0e-02 of 5, from layer 1 on"),
    ({"logits": NEAR | {"max_abs": math.nan}}, "outputs differ .* by nan"),
    ({"greedy": {"equal": False}}, "greedy continuations differ"),
    ({"tokenizer": {"equal": False}}, "AutoTokenizer gives other token ids"),
    ({"checked": False, "failed": True, "why_not": "transformers raised E: x"}, "raised E: x"),
  ],
)
def test_what_is_wrong_is_a_problem(values, message):
  (problem,) = parity.problems(GOOD | values)
  assert re.search(message, problem)


def test_equal_or_unchecked_is_none():
  assert parity.problems(GOOD) == []
  assert parity.problems(GOOD | {"tokenizer": {"equal": None, "why_not": "x"}}) == []
  assert parity.problems({"checked": False, "why_not": "y", "tokenizer": {"equal": None}}) == []


@pytest.mark.slow
def test_a_model_trained_with_eight_bit_products_is_compared_without_them(trained, tmp_path):
  pytest.importorskip("qwix", reason="pip install -e '.[quant]'")
  pytest.importorskip("transformers", reason="pip install -e '.[bench]'")
  import_export.export_run(trained, tmp_path / "hf", certify=False)
  run = load.load(trained, devices=jax.local_devices()[:1])
  run.c.model.quantize = "int8"
  with jax.set_mesh(run.mesh):
    found = parity.certify(tmp_path / "hf", run.c.model, run.params, run.tokenizer, "float32")
  assert found["checked"] and found["logits"]["max_abs"] <= parity.NEAR * found["logits"]["scale"]
  assert found["greedy"]["equal"]
