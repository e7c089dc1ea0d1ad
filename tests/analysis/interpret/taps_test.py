"""Taps: readings are the model's own activations, change nothing, and can be replaced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import tree
from jaxgpt.analysis.interpret import taps
from jaxgpt.errors import UserError
from jaxgpt.model import transformer
from tests.model.transformer_test import STYLES, make, model_of

QUICK = ("llama", "post")


@functools.cache
def read_all(style):
  """(model, params, inputs, outputs of the model itself, reading of every tap it has)."""
  model, params = make(causal=style != "post", **STYLES[style])
  model = taps.readable(model)
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, model.cfg.vocab_size)
  segments = jnp.asarray([[1] * 7 + [2] * 5, [1] * 10 + [0] * 2])
  inputs = taps.Inputs(tokens, segments, jnp.tile(jnp.arange(12), (2, 1)))
  own = jax.jit(functools.partial(model.apply, layer_outputs=True))(
    {"params": params}, tokens, inputs.positions, segments
  )
  names = tuple(n for n in taps.TAPS if n in taps.OF_MODEL or taps.layers_with(model.cfg, n))
  return model, params, inputs, own, taps.read(model, params, inputs, names)


@pytest.mark.parametrize(
  "style", [pytest.param(s, marks=() if s in QUICK else pytest.mark.slow) for s in STYLES]
)
def test_reading_changes_no_bit_of_the_outputs(style):
  model, _, _, own, reading = read_all(style)
  np.testing.assert_array_equal(reading.output.logits, own.logits)
  np.testing.assert_array_equal(reading.output.hidden, own.hidden)
  np.testing.assert_array_equal(reading.at["resid_post"], own.layers)
  at = reading.at
  np.testing.assert_array_equal(at["resid_pre"][0], at["embed"])
  np.testing.assert_array_equal(at["resid_pre"][1:], at["resid_post"][:-1])
  np.testing.assert_array_equal(at["resid_final"], at["resid_post"][-1])
  if model.cfg.norm_placement == "pre":
    np.testing.assert_allclose(at["resid_mid"], at["resid_pre"] + at["attn_out"], atol=1e-6)
    np.testing.assert_allclose(at["resid_post"], at["resid_mid"] + at["mlp_out"], atol=1e-6)
  for name, values in at.items():
    num_layers = len(taps.layers_with(model.cfg, name))
    shape = taps.TAPS[name].partition("]")[0].split(",")
    assert values.ndim == len(shape) + bool(num_layers)
    assert not num_layers or values.shape[0] == num_layers


def test_patterns_stay_within_a_document_and_sum_to_one():
  _, _, inputs, _, reading = read_all("llama")
  segments = np.asarray(inputs.segments)
  visible = (
    (segments[:, :, None] == segments[:, None]) & (segments[:, None] > 0) & np.tri(12, dtype=bool)
  )
  pattern = np.moveaxis(np.asarray(reading.at["pattern"]), 2, 0)  # [N, L, B, T, S]
  assert (pattern[..., ~visible] == 0).all()
  assert (pattern[..., visible] > 0).all()
  np.testing.assert_allclose(pattern.sum(-1)[..., segments > 0], 1, atol=1e-5)


def test_edits_replace_activations_before_the_model_goes_on():
  model, params, inputs, _, reading = read_all("llama")
  zeroed = np.zeros((2, 1, 1, 4, 1), bool)
  zeroed[1, :, :, 2] = True  # head 2 of layer 1
  moved = np.zeros((2, 2, 12, 1), bool)
  moved[1, 0, 3] = True  # layer 1 reads other words at position 3 of row 0
  other = reading.at["resid_pre"][:, ::-1]
  edited = taps.read(
    model,
    params,
    inputs,
    ("resid_pre", "heads"),
    {"heads": taps.Edit(zeroed, 0.0), "resid_pre": taps.Edit(moved, other)},
  )
  cut = jax.tree.map(jnp.array, params)
  cut["layers"]["attn"]["o"] = cut["layers"]["attn"]["o"].at[1, 2].set(0)
  by_weights = taps.read(
    model, cut, inputs, (), {"resid_pre": taps.Edit(moved, other), "heads": taps.Edit(False, 0.0)}
  )
  np.testing.assert_allclose(edited.output.logits, by_weights.output.logits, atol=1e-5)
  assert (edited.at["heads"][1, :, :, 2] == 0).all()
  np.testing.assert_array_equal(edited.at["resid_pre"][1, 0, 3], other[1, 0, 3])
  np.testing.assert_array_equal(edited.at["resid_pre"][0], reading.at["resid_pre"][0])
  assert np.abs(edited.output.logits - reading.output.logits).max() > 1e-2


def test_wrong_names_and_shapes_are_refused():
  model, params, inputs, _, _ = read_all("llama")
  with pytest.raises(UserError, match="did you mean 'resid_pre'"):
    taps.forward(model, params, inputs, ("resid_pr",))
  with pytest.raises(UserError, match="3 entries, but 2 layers"):
    taps.forward(model, params, inputs, (), {"heads": taps.Edit(np.zeros(3), 0.0)})
  moe = model_of(**STYLES["moe"] | dict(moe=dict(experts=4, width=16)))
  with pytest.raises(UserError, match="'mlp_hidden': no layer"):
    taps.forward(moe, {}, inputs, ("mlp_hidden",))


def test_a_model_without_mlps_is_its_attention_alone():
  model, params, inputs, _, _ = read_all("llama")
  without = taps.read(model, params, inputs, (), {"mlp_out": taps.Edit(True, 0.0)}).output.logits
  attention_only = model_of(
    **STYLES["llama"] | dict(mlp_pattern=("none",), attention="reference", gated=False)
  )
  layers = {k: v for k, v in params["layers"].items() if not k.startswith("mlp")}
  shapes = transformer.abstract(attention_only)[0]
  assert tree.flatten(shapes["layers"]).keys() == tree.flatten(layers).keys()
  logits = taps.read(attention_only, {**params, "layers": layers}, inputs).output.logits
  np.testing.assert_array_equal(logits, without)
