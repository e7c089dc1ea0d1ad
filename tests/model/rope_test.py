"""Rotary embedding: relative positions, and scalings as published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.model import rope


def section(**fields):
  c = config.base().model.rope
  c.update(dict(original_len=64) | fields)
  return c


def angles(positions, scaling="none", rotated=8, context=64, **fields):
  return rope.angles(jnp.asarray(positions), rotated, section(**fields), 10_000.0, scaling, context)


def test_rotary_positions_are_relative():
  q, k = (jax.random.normal(jax.random.key(seed), (1, 1, 1, 8)) for seed in (0, 1))

  def score(i, j):
    turn = lambda x, p: rope.rotate(x, *angles([[p]]))
    return float((turn(q, i) * turn(k, j)).sum())

  assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
  assert score(7, 3) != pytest.approx(score(7, 5), abs=1e-2)


def test_a_fraction_of_the_head_is_rotated():
  x = jax.random.normal(jax.random.key(0), (1, 1, 1, 8))
  y = rope.rotate(x, *angles([[5]], rotated=4))
  np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
  assert not np.allclose(y[..., :4], x[..., :4])


def test_rotation_by_matmul_is_bitwise_equal():
  x, dy = (jax.random.normal(jax.random.key(i), (2, 5, 3, 8), jnp.bfloat16) for i in (0, 1))
  turns = angles(np.arange(10).reshape(2, 5))
  made = []
  for by_matmul in (False, True):
    y, back = jax.vjp(lambda x, by=by_matmul: rope.rotate(x, *turns, by_matmul=by), x)
    made.append((y, *back(dy)))
  for plain, fast in zip(*made, strict=True):
    np.testing.assert_array_equal(plain.astype(np.float32), fast.astype(np.float32))
  text = jax.jit(lambda x: rope.rotate(x, *turns, by_matmul=True)).lower(x).as_text()
  assert "dot_general" in text


def test_linear_scaling_divides_positions():
  for a, b in zip(angles([[3]]), angles([[12]], "linear", factor=4.0), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("scaling", ["ntk", "llama3", "yarn"])
def test_scalings_keep_high_frequencies_and_slow_low_ones(scaling):
  inverse, _ = rope.SCALINGS["none"](10_000.0, 32, section(), 64)
  scaled, factor = rope.SCALINGS[scaling](10_000.0, 32, section(factor=4.0, low_freq=1.0), 256)
  assert scaled[0] == pytest.approx(inverse[0])
  assert scaled[-1] == pytest.approx(inverse[-1] / 4, rel=0.1) or scaling == "ntk"
  assert scaled[-1] < inverse[-1] / 3
  assert (np.diff(scaled) < 0).all()
  assert (factor > 1) == (scaling == "yarn")


def test_ntk_and_longrope_depend_on_the_context():
  fields = dict(factor=4.0, short_factors=(1.0,) * 4, long_factors=(2.0,) * 4)
  plain, _ = rope.SCALINGS["none"](10_000.0, 8, section(), 64)
  for name in ("ntk", "longrope"):
    within, _ = rope.SCALINGS[name](10_000.0, 8, section(**fields), 64)
    beyond, _ = rope.SCALINGS[name](10_000.0, 8, section(**fields), 65)
    np.testing.assert_allclose(within, plain)
    assert (beyond[1:] < plain[1:]).all()
