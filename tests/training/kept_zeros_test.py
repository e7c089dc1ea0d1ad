"""Pruning in training, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.training import kept_zeros, optimizers

AXES = {"w": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")}


def test_zeros_get_no_update_and_no_moment():
  tx = kept_zeros.keeping_zeros(optax.adam(0.1), AXES)
  params = {"w": jnp.array([[[0.0, 1.0], [2.0, 0.0]]]), "bias": jnp.zeros((1, 2))}
  grads = jax.tree.map(jnp.ones_like, params)
  updates, state = tx.update(grads, tx.init(params), params)
  assert (updates["w"][0] != 0).tolist() == [[False, True], [True, False]]
  assert (state[0].mu["w"][0] != 0).tolist() == [[False, True], [True, False]]
  assert (updates["bias"] != 0).all()  # zeros of biases are not pruned weights


def test_the_smallest_weights_of_each_layer_are_pruned_by_a_cubic_schedule():
  c = config.base().optim.prune
  c.update(dict(sparsity=0.8, start=2, end=7, every=2))
  tx = kept_zeros.gradual(optax.sgd(0.01), c, {"w": True, "bias": False})
  tx = kept_zeros.keeping_zeros(tx, AXES)
  rng = np.random.default_rng(0)
  params = {"w": jnp.array(rng.normal(size=(3, 4, 5))), "bias": jnp.ones((3, 5))}
  state, update, counts = tx.init(params), jax.jit(tx.update), []
  kept = np.ones((3, 20), bool)
  for step in range(10):
    grads = jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape)), params)
    before = np.asarray(params["w"]).reshape(3, 20)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    if step in (2, 4, 6, 7):
      share = 0.8 * (1 - (1 - (step - 2) / 5) ** 3)
      moved = np.abs(before - 0.01 * np.asarray(grads["w"]).reshape(3, 20) * kept)
      for layer in range(3):
        kept[layer, np.argsort(moved[layer])[: round(20 * share)]] = False
    np.testing.assert_array_equal(np.asarray(params["w"]).reshape(3, 20) != 0, kept)
    counts.append(int((~kept).sum()))
  assert counts[:3] == [0, 0, 0] and counts[-1] == 48 and (params["bias"] != 0).all()


def test_a_schedule_that_does_not_fit_the_run_is_refused():
  c = config.base()
  c.train.steps = 10
  c.optim.prune.update(dict(sparsity=0.5, start=6))
  with pytest.raises(UserError, match="optim.prune.end=5: must be above optim.prune.start=6"):
    optimizers.check(c)
