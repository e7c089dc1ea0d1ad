"""Quantization, against its definition, against qwix, and in a run that is loaded and used."""

import numpy as np
import pytest

from jaxgpt.analysis.compression import (
  calibration,
  column_sweep,
  compressed_run,
  quantize,
  rounding,
)
from jaxgpt.commands.models import quantize as command
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.run.compression import quantized_weights
from jaxgpt.run.compression.matrix import Matrix
from tests.trained import train

INPUTS, OUTPUTS = 24, 5


@pytest.fixture(scope="module")
def problem():
  rng = np.random.default_rng(1)
  x_TI = rng.normal(size=(200, INPUTS)) @ rng.normal(size=(INPUTS, INPUTS))
  return rng.normal(size=(INPUTS, OUTPUTS)).astype("float32"), (x_TI.T @ x_TI).astype("float32")


def rounded(x, scale, bits):
  """The definition, for one number."""
  return min(max(np.rint(x / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) * scale


@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 1), (4, 3)])
def test_nearest_equals_its_definition(problem, bits, groups):
  weight_IO, _ = problem
  found, size = rounding.nearest(weight_IO, bits, groups), INPUTS // groups
  for o in range(OUTPUTS):
    for i in range(INPUTS):
      group = weight_IO[i // size * size : (i // size + 1) * size, o]
      scale = np.abs(group).max() / (2 ** (bits - 1) - 0.5)
      choices = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) * scale
      smallest = np.abs(choices - weight_IO[i, o]).min()
      assert np.abs(found.weight()[i, o] - weight_IO[i, o]) == pytest.approx(smallest, abs=1e-6)


def gptq_by_definition(weight_IO, products_II, bits, groups):
  """GPTQ with the inverse of H over the inputs that are left at each step, in float64."""
  w, size = weight_IO.astype("float64"), INPUTS // groups
  h = products_II + np.eye(INPUTS) * column_sweep.DAMP * np.diag(products_II).mean()
  for j in range(INPUTS):
    if j % size == 0:
      scale_O = np.abs(w[j : j + size]).max(0) / (2 ** (bits - 1) - 0.5)
    inverse = np.linalg.inv(h[j:, j:])
    for o in range(OUTPUTS):
      new = rounded(w[j, o], scale_O[o], bits)
      w[j + 1 :, o] -= (w[j, o] - new) / inverse[0, 0] * inverse[0, 1:]
      w[j, o] = new
  return w


@pytest.mark.parametrize(("bits", "groups", "block"), [(8, 1, 128), (4, 1, 8), (4, 3, 8)])
def test_gptq_equals_its_definition(problem, bits, groups, block, monkeypatch):
  monkeypatch.setattr(column_sweep, "_BLOCK", block)
  expected = gptq_by_definition(*problem, bits, groups)
  found = quantize.gptq(*problem, bits, groups)
  np.testing.assert_allclose(found.weight(), expected, atol=1e-4)
  error = lambda w: np.trace((w - problem[0]).T @ problem[1] @ (w - problem[0]))
  assert error(found.weight()) < error(rounding.nearest(problem[0], bits, groups).weight())


def test_qwix_rounds_to_the_same_codes(problem):
  qwix = pytest.importorskip("qwix")

  weight_IO, _ = problem
  found = rounding.nearest(weight_IO, 4, 3)
  theirs = qwix.quantize(weight_IO, "int4", channelwise_axes=(1,), tiled_axes={0: 8})
  np.testing.assert_array_equal(found.codes_IO, np.asarray(theirs.qvalue, "int8"))
  np.testing.assert_allclose(found.scales_GO, theirs.scale, rtol=1e-6)


@pytest.mark.slow  # qwix compiles each of its steps
def test_gptq_of_qwix_gives_the_same_codes(problem):
  pytest.importorskip("qwix")
  from qwix._src.core import qarray
  from qwix.contrib import gptq_core

  weight_IO, products_II = problem
  how = qarray.HowToQuantize(qtype="int4", channelwise_axes=(0,))
  theirs, _ = gptq_core.quantize_weight(weight_IO.T, products_II, how)
  np.testing.assert_array_equal(
    quantize.gptq(weight_IO, products_II, 4, 1).codes_IO, np.asarray(theirs.qvalue, "int8").T
  )


@pytest.mark.parametrize("bits", [8, 4])
def test_stored_codes_come_back(bits):
  rng = np.random.default_rng(0)
  matrix = Matrix("layers/o", (2, 3, 5, 4), (1, 2), (3,))  # 15 inputs: half a byte is left over
  form = quantized_weights.Form(matrix, bits, 3)
  codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (2, 15, 4))
  scales = rng.random((2, 3, 4)).astype("float32")
  arrays = form.store(codes, scales)
  assert {k: (v.shape, str(v.dtype)) for k, v in arrays.items()} == form.shapes()
  expected = (codes.reshape(2, 3, 5, 4) * scales[:, :, None]).reshape(2, 3, 5, 4)
  np.testing.assert_allclose(form.weight(**_named(arrays)), expected, rtol=1e-6)


def _named(arrays):
  return {"codes": arrays["codes"], "scales_MGO": arrays["scales"]}


@pytest.fixture(scope="module")
def int4(trained, tmp_path_factory):
  folder = tmp_path_factory.mktemp("int4") / "run"
  settings = quantize.Settings("gptq", 4, 16, (), 8)
  sizes = compressed_run.quantized(trained, folder, settings, compressed_run.Calibration(rows=16))
  return folder, sizes


@pytest.mark.slow
def test_a_quantized_run_is_small_and_used_as_it_is(trained, int4, tiny, tmp_path):
  folder, sizes = int4
  assert sizes.plain / sizes.stored > 3.5
  before, run = load.load(trained), load.load(folder)
  losses = [load.evaluate_run(r)["loss"] for r in (before, run)]
  assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.05)
  weights, plain = calibration.flat(run.params), calibration.flat(before.params)
  q = weights["layers/attn/q"]
  assert len(np.unique(q[0, :16, 0, 0])) <= 16 and q.shape == plain["layers/attn/q"].shape
  np.testing.assert_allclose(
    weights["embed"], plain["embed"], atol=np.abs(plain["embed"]).max() / 250
  )
  np.testing.assert_array_equal(weights["final_norm/scale"], plain["final_norm/scale"])
  train(tiny(init_from=str(folder), train__steps=3), tmp_path / "new")  # also a base to train on


def test_settings_without_an_effect_are_refused(trained, int4, tmp_path):
  make = lambda settings: compressed_run.quantized(trained, tmp_path / "x", settings)
  with pytest.raises(UserError, match="--group=12: layers/attn/k has 32 inputs"):
    make(quantize.Settings("nearest", 4, 12))
  with pytest.raises(UserError, match="--match: embed is no matrix of a layer"):
    make(quantize.Settings("nearest", 4, 0, ("embed",)))
  assert not (tmp_path / "x").exists()
  options = lambda **more: command.QuantizeOptions(workdir="a", to="b", **more)
  with pytest.raises(UserError, match="--rows has no effect with --method=nearest"):
    options(weights="int8", rows=3)
  with pytest.raises(UserError, match="--activations=int8 needs --weights=int8 without --group"):
    options(weights="int4", activations="int8")
