"""AWQ: its search against the definition, and models that compute the same after the scaling."""

import jax
import numpy as np
import pytest

from jaxgpt import config, tree
from jaxgpt.analysis.compression import awq, calibration, quantize
from jaxgpt.model import transformer
from jaxgpt.run.compression.matrix import Matrix
from jaxgpt.run.compression.quantized_weights import Form

TOKENS, HEADS, REPEATS, SIZE = 40, 2, 3, 4
INPUTS = HEADS * REPEATS * SIZE
POSITIONS = lambda tokens: np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)


def by_definition(x_TI, weights, bits, groups, repeats):
  """(exponent, scale [I], error) of the smallest error, by loops over equation 4 of the paper."""
  best = None
  for a in np.arange(20) / 20:
    m_I = np.abs(x_TI).mean(0).reshape(-1, repeats, SIZE)
    m_I = np.broadcast_to(m_I.mean(1, keepdims=True), m_I.shape).reshape(-1)
    s_I = m_I**a / np.sqrt((m_I**a).max() * (m_I**a).min())
    error = 0.0
    for w_IO in weights:
      scaled, rounded = w_IO * s_I[:, None], np.empty_like(w_IO)
      for o in range(w_IO.shape[1]):
        for rows in np.split(np.arange(len(w_IO)), groups):
          step = np.abs(scaled[rows, o]).max() / (2 ** (bits - 1) - 0.5)
          codes = np.clip(np.rint(scaled[rows, o] / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
          rounded[rows, o] = codes * step
      error += np.square((x_TI / s_I) @ rounded - x_TI @ w_IO).sum()
    if best is None or error < best[2]:
      best = (a, s_I, error)
  return best


@pytest.mark.parametrize(
  ("bits", "groups", "repeats"), [(4, 1, 1), (4, 2, 1), (8, 1, 1), (4, 2, 3)]
)
def test_the_search_equals_its_definition(bits, groups, repeats):
  rng = np.random.default_rng(3)
  x_TI = rng.normal(size=(TOKENS, INPUTS)) * np.exp(rng.normal(size=INPUTS) * 1.5)
  # Positive, since the largest weight of a group lies in the middle between the codes 7 and 8, or
  # -7 and -8, and only the former are decided by the clipping.
  weights = [np.abs(rng.normal(size=(INPUTS, outputs))) for outputs in (5, 7)]
  params = {f"w{i}": w.astype("float32") for i, w in enumerate(weights)}
  products, magnitude = (x_TI.T @ x_TI).astype("float32"), np.abs(x_TI).mean(0)
  seen = calibration.Seen(
    "layers", 0, {}, dict.fromkeys(params, products), dict.fromkeys(params, magnitude), 0.0, TOKENS
  )
  forms = {
    name: Form(Matrix(name, (1, *w.shape), (1,), (2,)), bits, groups) for name, w in params.items()
  }
  shape = (INPUTS // repeats // SIZE, SIZE) if repeats > 1 else (INPUTS,)
  found = awq.search(awq.Link((), tuple(params), shape, repeats), params, forms, seen)
  exponent, scale_I, error = by_definition(x_TI, weights, bits, groups, repeats)
  assert found.exponent == exponent > 0
  np.testing.assert_allclose(
    found.scale.reshape(shape).repeat(repeats, 0).reshape(-1), scale_I, rtol=1e-5
  )
  by_jax = sum(
    float(awq.errors(w, products, scale_I[None].astype("float32"), bits, groups)[0])
    for w in params.values()
  )
  assert by_jax == pytest.approx(error, rel=1e-3)


MODELS = {
  "llama": dict(norm="rmsnorm", gated=True, num_kv_heads=2),
  "biases": dict(norm="layernorm", gated=True, bias=True, qkv_bias=True, num_kv_heads=4),
  "relu": dict(norm="rmsnorm", gated=False, activation="relu", num_kv_heads=1),
  "relu2": dict(norm="rmsnorm", gated=False, activation="relu2", num_kv_heads=4),
  "gelu": dict(norm="layernorm", gated=False, activation="gelu", bias=True, num_kv_heads=4),
  "gemma2": dict(norm="rmsnorm", gated=True, num_kv_heads=2, norm_placement="both"),
  "olmo2": dict(norm="rmsnorm", gated=True, num_kv_heads=2, norm_placement="branch"),
  "bert": dict(norm="layernorm", gated=False, activation="gelu", norm_placement="post",
               num_kv_heads=4, bias=True),
}  # fmt: skip
LINKS = dict(llama=4, biases=4, relu=4, relu2=4, gelu=3, gemma2=4, olmo2=2, bert=1)


@pytest.mark.parametrize(
  "name",
  [n if n in ("llama", "relu2") else pytest.param(n, marks=pytest.mark.slow) for n in MODELS],
)
def test_scaled_activations_compute_the_same(tiny, name):
  c = config.resolve(tiny(**{f"model__{k}": v for k, v in MODELS[name].items()}))
  c.model.vocab_size = 64
  model = transformer.Transformer(c.model)
  tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, c.model.vocab_size)
  params = jax.jit(lambda: transformer.init(model, jax.random.key(1)))()
  noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
  params = jax.tree.map(lambda x: np.asarray(noise(x)), jax.device_get(params))
  rng = np.random.default_rng(0)
  layers = {path: np.array(x) for path, x in tree.flatten(params["layers"]).items()}
  of_layer = lambda i: {path: x[i] for path, x in layers.items()}
  found = awq.links(c.model, of_layer(0))
  assert len(found) == LINKS[name]
  for i in range(c.model.num_layers):
    new = of_layer(i)
    for link in found:
      new |= awq.folded(link, new, np.exp(rng.normal(size=link.shape)).astype("float32"))
    for path, x in new.items():
      layers[path][i] = x
  changed = {**params, "layers": tree.unflatten(layers)}
  run = jax.jit(lambda p: model.apply({"params": p}, tokens, POSITIONS(tokens)).logits)
  before, after = run(params), run(changed)
  np.testing.assert_allclose(after, before, atol=2e-4 * np.abs(before).max())
  assert (
    sum((layers[p] != x).any() for p, x in tree.flatten(params["layers"]).items()) >= LINKS[name]
  )


@pytest.mark.slow
def test_large_activations_are_kept(opened, text):
  run = opened._replace(params=with_outliers(opened.params))
  assert distance(opened, run.params, text) < 1e-8  # the same function
  made = quantize.quantize(run, quantize.Settings("awq", 4, 16), text)
  assert set(made.exponents) == {
    "layers/attn/q,layers/attn/k,layers/attn/v",
    "layers/attn/o",
    "layers/mlp/gate,layers/mlp/up",
    "layers/mlp/down",
  }
  assert min(made.exponents["layers/mlp/gate,layers/mlp/up"]) > 0.2
  rounded = quantize.quantize(run, quantize.Settings("nearest", 4, 16))
  near, far = (distance(opened, params_of(run, m), text) for m in (made, rounded))
  assert near < far / 4


def with_outliers(params):
  """The same model with three inputs of each layer's matrices 50 times as large as the others."""
  named = {path: np.array(x) for path, x in tree.flatten(params).items()}
  some = [3, 11, 20]
  for norm, readers in (("attn_norm", "qkv"), ("mlp_norm", ("gate", "up"))):
    named[f"layers/{norm}/scale"][:, some] *= 50
    for name in readers:
      named[f"layers/{norm.split('_')[0]}/{name}"][:, some] /= 50
  like = tree.flatten(params)
  return tree.unflatten({path: jax.device_put(x, like[path].sharding) for path, x in named.items()})


def params_of(run, made):
  """The weights that quantized ones stand for."""
  named = tree.flatten(made.stored)
  return tree.unflatten(
    {
      path: np.asarray(
        made.forms[path].weight(named[f"{path}/codes"], named[f"{path}/scales"])
        if path in made.forms
        else named[path]
      )
      for path in tree.flatten(run.params)
    }
  )


def distance(opened, params, text):
  """Mean squared difference of the logits from the original's."""
  model = transformer.Transformer(opened.parts.model.cfg)
  run = jax.jit(lambda p, tokens: model.apply({"params": p}, tokens, POSITIONS(tokens)).logits)
  host = lambda p: jax.device_get(p)
  tokens = np.asarray(text[0]["tokens"])
  return float(np.square(run(host(params), tokens) - run(host(opened.params), tokens)).mean())


def test_scales_of_unused_inputs_are_finite():
  np.testing.assert_array_equal(awq.scale_of(np.array([0.0, 2.0]), 0.0), [1, 1])
  assert np.isfinite(awq.scale_of(np.array([0.0, 2.0]), 0.95)).all()
