"""muP and its extension to depth, parameter by parameter, against the definition."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxgpt import config, tree
from jaxgpt.analysis.interpret import taps
from jaxgpt.errors import UserError
from jaxgpt.model import transformer
from jaxgpt.model.scaling import mup
from jaxgpt.parallel import sharding
from jaxgpt.training import optimizers

# n = 32 / 8 = 4 times as wide, l = 8 / 2 = 4 times as deep, l^(a-1) = l^-a = 1/2 with a = 1/2.
MUP = dict(base_width=8, base_depth=2, depth_power=0.5)
ALL_KINDS = dict(
  vocab_size=40,
  num_layers=8,
  width=32,
  num_heads=4,
  mlp_pattern=("dense", "moe"),
  moe=dict(experts=2, per_token=1, shared=1, router="sigmoid"),
  gated=True,
  qk_norm="head",
  embed_norm=True,
  token_types=2,
  tie_embeddings=False,
  head_bias=True,
  head_transform="norm",
)
# (init, rate, decay, eps), as numbers.
INPUT = (1, 1, 1, 1 / 4)
HIDDEN = (1 / 2, 1 / 8, 4, 1 / 8)  # in a layer
HIDDEN_AFTER = (1 / 2, 1 / 4, 4, 1 / 4)  # after the layers
VECTOR = (1, 1 / 2, 1, 1 / 8)  # in a layer
VECTOR_OUTSIDE = (1, 1, 1, 1 / 4)
OUTPUT = (1, 1, 1, 1 / 4)
ROUTER = (1 / 4, 1 / 8, 4, 1 / 2)
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def want(path):
  last = path.split("/")[-1]
  if path.startswith("layers"):
    return HIDDEN if last in MATRICES else ROUTER if last == "router" else VECTOR
  outside = {"embed": INPUT, "pos_embed": INPUT, "type_embed": INPUT}
  outside |= {"head": OUTPUT, "head_dense": HIDDEN_AFTER}
  return outside.get(last, VECTOR_OUTSIDE)


def resolved(mup_fields=None, optim=None, **model):
  c = config.base()
  c.model.update(model or ALL_KINDS)
  c.model.mup.update(mup_fields or {})
  c.optim.update(optim or {})
  return config.resolve(c)


def model_of(c):
  return transformer.Transformer(ml_collections.FrozenConfigDict(c.model))


def initial(c):
  return jax.jit(lambda: transformer.init(model_of(c), jax.random.key(0)))()


def _host(params):
  return jax.tree.map(np.asarray, params)


def update_of(c, params, grads):
  optimizers.check(c)
  model = model_of(c)
  depths = transformer.depths(c.model, params)
  tx = optimizers.make(c, lambda step: 1.0, transformer.abstract(model)[1], depths)
  return jax.jit(lambda: tx.update(grads, tx.init(params), params)[0])()


@pytest.fixture(scope="module")
def plain():
  """(config, initial weights) of a model with every kind of parameter."""
  c = resolved()
  return c, initial(c)


def test_factors_of_every_parameter():
  c = resolved(MUP)
  axes = tree.flatten(transformer.abstract(model_of(c))[1], is_leaf=sharding.is_axes)
  found = {path: tuple(mup.factors(c.model, names)) for path, names in axes.items()}
  assert found == {path: want(path) for path in axes}
  assert {"layers/1/mlp/router", "layers/1/mlp/shared/up", "layers/0/attn/q_norm/scale"} < set(axes)
  assert (c.model.attn_scale, c.model.output_scale, c.model.residual_scale) == (1 / 8, 1 / 4, 1 / 2)
  c = resolved(MUP | dict(base_head_dim=2))
  assert c.model.attn_scale == 2**0.5 / 8
  assert resolved().model.attn_scale == 8**-0.5
  assert set(mup.factors(resolved().model, ("embed", "mlp"))) == {1.0}


def test_initial_weights_and_updates_are_those_of_the_factors(plain):
  c, params = plain
  scaled = resolved(MUP, dict(lr=0.5, weight_decay=0.25, eps=0.125))
  params = _host(params)
  ratios = jax.tree.map(lambda a, b: a / np.where(b == 0, 1, b), _host(initial(scaled)), params)
  for path, ratio in tree.flatten(ratios).items():
    # Weights that write to the residual stream: 1/sqrt(2 * base_depth) for 1/sqrt(2 * num_layers).
    depth = 2 if path.split("/")[-1] in ("o", "down") else 1
    used = ratio[ratio != 0]
    np.testing.assert_allclose(used, want(path)[0] * depth, rtol=1e-5, err_msg=path)
  source = np.random.default_rng(0)
  grads = jax.tree.map(lambda p: source.normal(size=p.shape).astype(np.float32), params)
  updates = tree.flatten(update_of(scaled, params, grads))
  axes = tree.flatten(transformer.abstract(model_of(c))[1], is_leaf=sharding.is_axes)
  for path, g in tree.flatten(grads).items():
    _, rate, decay, eps = want(path)
    direction = g / (np.abs(g) + 0.125 * eps)  # Adam's first step
    weight = tree.flatten(params)[path] if sharding.is_weight(axes[path]) else 0.0
    expected = -0.5 * rate * (direction + 0.25 * decay * weight)
    np.testing.assert_allclose(updates[path], expected, rtol=2e-5, atol=1e-6, err_msg=path)


def test_a_model_of_the_base_size_is_as_without(plain):
  c, params = plain
  same = resolved(dict(base_width=32, base_head_dim=8, base_depth=8))
  assert same.model.attn_scale == c.model.attn_scale
  assert (same.model.output_scale, same.model.residual_scale) == (1, 1)
  equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
  equal(initial(same), params)
  grads = jax.tree.map(np.sin, _host(params))
  equal(update_of(same, params, grads), update_of(c, params, grads))


def test_scales_of_the_forward_pass():
  small = dict(vocab_size=40, num_layers=1, width=16, num_heads=2, mlp_pattern=("none",))
  one = resolved(**small)
  params = initial(one)
  inputs = taps.Inputs(jnp.arange(12).reshape(2, 6))

  def read(**fields):
    c = resolved(**small, **fields)
    found = taps.read(taps.readable(model_of(c)), params, inputs, ("attn_out", "resid_final"))
    return found.output.logits, found.at["attn_out"]

  logits, branch = read()
  np.testing.assert_allclose(read(output_scale=0.25)[0], logits / 4, rtol=1e-5)
  np.testing.assert_allclose(read(residual_scale=0.5)[1], branch / 2, rtol=1e-5)
  assert not np.allclose(read(residual_scale=0.5)[0], logits, rtol=1e-3)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"init_from": "run"}, "model.mup.base_width=8 is for models that start from random weights"),
    ({"model.lora.rank": 2}, "no rule for model.lora.rank=2"),
    (
      {"model.latent": dict(kv_rank=2, rope_dim=2), "model.position": "rotary"},
      "model.latent.kv_rank=2",
    ),
    ({"model.norm_placement": "post"}, "no rule for model.norm_placement='post'"),
    ({"optim.name": "muon"}, "only for those of 'adamw', 'lion'"),
    ({"optim.name": "adafactor"}, "optim.name='adafactor': model.mup has no rule"),
  ],
)
def test_what_has_no_rule_is_refused(changes, words):
  c = config.base()
  c.model.update(dict(vocab_size=40, num_layers=2, width=16, num_heads=2))
  c.model.mup.update(dict(base_width=8, base_depth=1))
  c.model.latent.update(changes.pop("model.latent", {}))
  c.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=words.replace("(", "\\(")):
    optimizers.check(config.resolve(c))
