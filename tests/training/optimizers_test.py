"""Roles of parameters are read off their logical axes."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from jaxgpt import config, tree
from jaxgpt.errors import UserError
from jaxgpt.model import transformer
from jaxgpt.parallel import sharding
from jaxgpt.training import optimizers
from tests import quick


def setup(**fields):
  c = config.base()
  c.model.update(
    dict(vocab_size=40, num_layers=2, width=16, num_heads=2, gated=True, tie_embeddings=False)
  )
  c.optim.update(fields)
  c = config.resolve(c)
  optimizers.check(c)
  model = transformer.Transformer(ml_collections.FrozenConfigDict(c.model))
  params = jax.jit(lambda: transformer.init(model, jax.random.key(0)))()
  axes = transformer.abstract(model)[1]
  tx = optimizers.make(c, lambda step: 1.0, axes, transformer.depths(c.model, params))
  return params, axes, jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])


def test_weights_decay_and_norms_and_biases_do_not():
  params, axes, update = setup(name="adamw", lr=0.1, weight_decay=0.5)
  params = jax.tree.map(jnp.ones_like, params)
  updates = update(jax.tree.map(jnp.zeros_like, params), params)
  for name, change in tree.flatten(updates).items():
    decays = not any(word in name for word in ("norm", "bias"))
    np.testing.assert_allclose(change, -0.05 if decays else 0.0, err_msg=name)
  assert any(map(sharding.is_weight, tree.flatten(axes, is_leaf=sharding.is_axes).values()))


@pytest.mark.slow
def test_adafactor_treats_each_layer_on_its_own():
  params, _, update = setup(name="adafactor", weight_decay=0.0)
  grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
  louder = tree.map_named(
    lambda name, g: g.at[1].multiply(100.0) if name.startswith("layers") else g, grads
  )
  first, second = (tree.flatten(update(g, params)) for g in (grads, louder))
  for name in ("layers/mlp/up", "layers/attn/q", "layers/attn_norm/scale"):
    np.testing.assert_allclose(first[name][0], second[name][0], rtol=1e-5)


@pytest.mark.parametrize(
  "axes, want",
  [
    (("layers", "embed", "heads", "head_dim"), ((1,), (2, 3))),
    (("layers", "heads", "head_dim", "embed"), ((1, 2), (3,))),
    (("layers", "embed", "mlp"), ((1,), (2,))),
    (("layers", "latent", "heads", "head_dim"), ((1,), (2, 3))),
    (("layers", "embed", "rank"), ((1,), (2,))),
    (("layers", "mlp", "embed"), ((1,), (2,))),
    (("layers", "experts", "embed", "mlp"), ((2,), (3,))),
    (("vocab", "embed"), None),
    (("layers", "norm"), None),
    (("layers", "heads", "head_dim"), None),
  ],
)
def test_matrices_map_the_residual_stream(axes, want):
  assert optimizers.matrix_axes(axes) == want


def test_muon_orthogonalises_each_layers_matrices_and_leaves_the_rest_to_adam():
  params, _, update = setup(name="muon", lr=1.0, adam_lr=0.1, weight_decay=0.0)
  grads = tree.map_named(
    lambda name, p: jax.random.normal(jax.random.key(len(name)), p.shape), params
  )
  named = tree.flatten(update(grads, params))
  up = named["layers/mlp/up"]  # [L, D, F]
  for layer in up:
    values = np.linalg.svd(layer, compute_uv=False) / (0.2 * layer.shape[1] ** 0.5)
    assert (values > 0.5).all() and (values < 1.5).all()
  adam = optax.scale_by_adam(0.9, 0.95, 1e-8)
  want, _ = adam.update(grads["embed"], adam.init(params["embed"]))
  np.testing.assert_allclose(named["embed"], -0.1 * want, rtol=1e-5)


@pytest.mark.parametrize("name", quick.first(["adamw", "lion", "muon"], 2))
def test_moments_are_rounded_only_for_the_next_step(name):
  """The first update from rounded moments is the one from exact ones: they start as zero."""
  params, _, exact = setup(name=name)
  _, _, rounded = setup(name=name, first_dtype="bfloat16", b2=0.95)
  grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    rounded(grads, params),
    exact(grads, params),
  )


@pytest.mark.parametrize(
  "fields, want",
  [
    (dict(name="adafactor", first_dtype="bfloat16"), "has no such moment"),
    (dict(name="lion", second_dtype="bfloat16"), "has no such moment"),
    (dict(second_dtype="bfloat16", b2=0.999), "needs optim.b2 <= 0.98"),
  ],
)
def test_moments_that_bfloat16_cannot_hold_are_refused(fields, want):
  with pytest.raises(UserError, match=want):
    setup(**fields)


def test_rates_fall_from_layer_to_layer_and_by_pattern():
  params, _, update = setup(
    name="lion",
    lr=1.0,
    weight_decay=0.0,
    layer_decay=0.5,
    lr_scales=(("layers/mlp/*", 0.1), ("head", 3.0)),
  )
  updates = tree.flatten(update(jax.tree.map(jnp.ones_like, params), params))
  assert (updates["embed"] == -0.25).all()  # one below the first of two layers
  np.testing.assert_array_equal(updates["layers/attn/q"][:, 0, 0, 0], [-0.5, -1.0])
  np.testing.assert_allclose(updates["layers/mlp/up"][:, 0, 0], [-0.05, -0.1], rtol=1e-6)
  assert (updates["head"] == -3).all() and (updates["final_norm/scale"] == -1).all()


def test_depths_follow_the_pattern_of_the_layers():
  c = config.base()
  c.model.update(
    dict(
      vocab_size=40,
      num_layers=5,
      width=16,
      num_heads=2,
      window=4,
      attention_pattern=("local", "global"),
    )
  )
  c = config.resolve(c)
  model = transformer.Transformer(ml_collections.FrozenConfigDict(c.model))
  depths = tree.flatten(transformer.depths(c.model, transformer.abstract(model)[0]))
  assert depths["layers/0/attn/q"].tolist() == [0, 2]
  assert depths["layers/1/attn/q"].tolist() == [1, 3]
  assert depths["last_layers/attn/q"].tolist() == [4]
  assert depths["embed"] == -1 and depths["final_norm/scale"] == 4


@pytest.mark.parametrize(
  "fields, want",
  [
    (
      dict(trainable=("layers/*",), frozen=("*bias",)),
      lambda path: path.startswith("layers/") and not path.endswith("bias"),
    ),
    (dict(frozen=("*embed",)), lambda path: not path.endswith("embed")),
  ],
)
def test_patterns_choose_what_is_trained(fields, want):
  _, axes, _ = setup()
  c = config.base().optim
  c.update(fields)
  paths = tree.flatten(axes, is_leaf=sharding.is_axes)
  assert optimizers.trained(c, axes) == {path for path in paths if want(path)}


def test_a_pattern_without_a_match_is_named():
  _, axes, _ = setup()
  c = config.base().optim
  c.trainable = ("layer/*",)
  with pytest.raises(UserError, match=r"optim.trainable: 'layer/\*' matches no parameter"):
    optimizers.trained(c, axes)


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(lr_scales=(("haed", 10.0),)), "'haed' matches no trained parameter; did you mean 'head'"),
    (dict(lr_scales=(("embed", 2.0),), trainable=("head",)), "'embed' .*there are: head$"),
    (dict(lr_scales=(("*", 2.0), ("head", 3.0))), "'head' has no effect, since earlier patterns"),
    (dict(trainable=("head",), frozen=("embed",)), "'embed' matches no trained parameter"),
    (dict(trainable=("head", "hed")), "optim.trainable: 'hed' matches no parameter"),
    (dict(trainable=("head",), layer_decay=0.5), "layer_decay=0.5 has no effect"),
    (dict(frozen=("*",)), "leaves no parameter to train"),
  ],
)
def test_settings_of_parameters_that_match_nothing_are_refused(fields, words):
  c, axes, depths = chosen(fields)
  with pytest.raises(UserError, match=words):
    paths = optimizers.trained(c, axes)
    optimizers.check_rates(c, tree.split(depths, paths)[0])


def test_settings_of_parameters_that_match_are_accepted():
  c, axes, depths = chosen(dict(lr_scales=(("layers/mlp/*", 0.1), ("layers/*", 2.0))))
  optimizers.check_rates(c, depths)
  c, axes, _ = chosen(dict(trainable=("head", "embed"), frozen=("head",)))
  assert optimizers.trained(c, axes) == {"embed"}
  c, axes, _ = chosen(dict(trainable=("head",), frozen=("embed",)))
  assert optimizers.trained(c, axes, strict=False) == {"head"}  # a run of an earlier version


def chosen(fields):
  """(the `optim` section, axes and depths of all parameters) of a small model."""
  c = config.base()
  c.model.update(dict(vocab_size=40, num_layers=2, width=16, num_heads=2, tie_embeddings=False))
  c.optim.update(fields)
  c = config.resolve(c)
  model = transformer.Transformer(ml_collections.FrozenConfigDict(c.model))
  shapes, axes = transformer.abstract(model)
  return c.optim, axes, transformer.depths(c.model, shapes)
