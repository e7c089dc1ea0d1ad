"""Hand-written gradients agree with derived ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.model import ops
from jaxgpt.training import losses


def same_gradients(f, g, *args):
  def both(h):
    out, vjp = jax.vjp(h, *args)
    return out, vjp(jax.tree.map(jnp.cos, out))

  close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)
  jax.tree.map(close, both(f), both(g))


def normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias):
  def plain(x, scale, *bias):
    y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale
    return y + bias[0] if bias else y

  args = [normal(2, 3, 8) * 3 + 1, normal(8, seed=1)] + ([normal(8, seed=2)] if bias else [])
  ours = lambda x, scale, *bias: ops.layer_norm(x, scale, bias[0] if bias else None, 1e-5)
  same_gradients(ours, plain, *args)


@pytest.mark.parametrize("num_in", [1, 2])
def test_times_with_a_large_weight(num_in):
  """Its gradient is written by hand from `ops._LARGE` numbers on."""
  x, w = normal(2, 3, *(8, 32)[-num_in:]), normal(*(8, 32)[-num_in:], 12, 6, seed=1)
  assert w.size < ops._LARGE
  derived = lambda x, w: ops.times(x, w, num_in, wide_gradient=False)

  def by_hand(x, w):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(ops, "_LARGE", w.size)
      return ops.times(x, w, num_in, wide_gradient=False)

  assert "custom_vjp" in str(jax.make_jaxpr(by_hand)(x, w))
  assert "custom_vjp" not in str(jax.make_jaxpr(derived)(x, w))
  same_gradients(by_hand, derived, x, w)


def test_gelu():
  same_gradients(ops.gelu, lambda x: jax.nn.gelu(x, approximate=True), normal(50) * 4)
  far = jnp.array([-200.0, -30.0, 30.0, 200.0])
  assert np.isfinite(jax.vmap(jax.grad(ops.gelu))(far)).all()


def test_cross_entropy_and_its_normaliser():
  targets = jnp.array([[0, 4, 2]])

  def plain(logits):
    log_z = jax.nn.logsumexp(logits, -1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0], log_z

  same_gradients(lambda x: losses.cross_entropy(x, targets), plain, normal(1, 3, 5) * 5)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_few_largest_are_those_of_top_k(k):
  x = jnp.array([[3, 1, 3, 2, 1, 3], [0, -1, -jnp.inf, 5, 5, 2], [0, 0, -2, -2, -7, -7]])
  for got, want in zip(ops.few_largest(x, k), jax.lax.top_k(x, k), strict=True):
    if k < 6:  # the sixth of the second row is -inf
      np.testing.assert_array_equal(got, want)
  values, ids = ops.few_largest(normal(2, 5, 7), k)
  want_values, want_ids = jax.lax.top_k(normal(2, 5, 7), k)
  np.testing.assert_array_equal(values, want_values)
  np.testing.assert_array_equal(ids, want_ids)
  with pytest.raises(ValueError, match="the 8 largest of 7 numbers"):
    ops.few_largest(normal(2, 5, 7), 8)


@pytest.mark.parametrize("what, barriers", [("none", 0), ("values", 1), ("gradients", 2)])
def test_materialized_keeps_values_and_gradients(what, barriers):
  x = jax.random.normal(jax.random.key(0), (3, 4))
  f = lambda x: jnp.sin(ops.materialized(x * 2, what)).sum()
  plain = lambda x: jnp.sin(x * 2).sum()
  np.testing.assert_array_equal(f(x), plain(x))
  np.testing.assert_array_equal(jax.grad(f)(x), jax.grad(plain)(x))
  assert str(jax.make_jaxpr(jax.grad(f))(x)).count("optimization_barrier") == barriers


def test_the_last_token_is_found_in_padded_packed_and_permuted_rows():
  segments_BT = np.array([[1] * 8, [1] * 5 + [0] * 3, [1] * 5 + [2] * 2 + [0], [1] + [0] * 7])
  positions_BT = np.array([range(8), [*range(5), 0, 0, 0], [*range(5), 0, 1, 0], [0] * 8])
  last_B = np.array([7, 4, 6, 0])
  x_BTD = np.arange(64.0).reshape(4, 8, 2)
  want_BD = x_BTD[np.arange(4), last_B]
  for order in (np.arange(8), np.array([0, 1, 6, 7, 2, 3, 4, 5])):  # rows, token_order.balance
    got_BD = ops.last_of(*(jnp.asarray(a[:, order]) for a in (x_BTD, positions_BT, segments_BT)))
    np.testing.assert_array_equal(got_BD, want_BD)
