"""Sums of parts as additions of slices, and the gradient of splash attention that they are in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives

from jaxgpt.model.attention import masks, reference
from jaxgpt.model.attention.blocks import choose
from jaxgpt.model.attention.kernels import splash
from jaxgpt.model.attention.kernels.added_parts import adding
from jaxgpt.model.attention.spec import Spec
from tests.model.attention.attention_test import inputs


def sums(fn, *args):
  """Shapes of the arrays that a function, and the functions that it calls, sum along one axis."""

  def of(jaxpr):
    for step in jaxpr.eqns:
      if step.primitive is primitives.reduce_sum_p and len(step.params["axes"]) == 1:
        yield step.invars[0].aval.shape
      for inner in jax.tree.leaves(list(step.params.values())):
        if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
          yield from of(getattr(inner, "jaxpr", inner))

  return list(of(jax.make_jaxpr(fn)(*args).jaxpr))


def of_parts(x, y):
  """Sums over the first of four dimensions, within a jitted function and outside of it."""
  inner = jax.jit(lambda x: (x.sum(0), x * 2, 3.0))
  total, twice, three = inner(x)
  return {"total": total, "again": jnp.sum(twice, 0) + three, "other": y.sum(0), "y": y}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_of_parts_become_additions(dtype):
  x = jax.random.normal(jax.random.key(0), (4, 2, 8, 16), dtype)
  y = jax.random.normal(jax.random.key(1), (3, 5), dtype)
  want, got = of_parts(x, y), adding(of_parts)(x, y)
  assert jax.tree.structure(want) == jax.tree.structure(got)
  assert [a.dtype for a in jax.tree.leaves(want)] == [a.dtype for a in jax.tree.leaves(got)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), want, got)
  assert sorted(sums(of_parts, x, y)) == [(3, 5), (4, 2, 8, 16), (4, 2, 8, 16)]
  assert sums(adding(of_parts), x, y) == [(3, 5)]


def test_sums_in_bfloat16_are_added_in_float32():
  x = jnp.array([256] + [1] * 16, jnp.bfloat16).reshape(17, 1, 1, 1)
  got = adding(lambda x: x.sum(0))(x)
  assert got.dtype == jnp.bfloat16 and got.item() == 272  # one after another in bfloat16: 256


@pytest.fixture
def fused(monkeypatch):
  """Blocks of 128 and the fused backward kernel, as chips choose them for long rows."""
  blocks = choose.Blocks((128, 128, 128), (128, 128, 128), True)
  monkeypatch.setattr(choose, "find", lambda call, chip: blocks)


def test_splash_attention_adds_up_its_gradient_of_the_queries(fused, monkeypatch):
  q, k, v, _ = inputs(T=256, H=128)
  segments = jnp.array([[1] * 100 + [2] * 100 + [0] * 56, [1] * 256])
  spec = Spec(scale=0.3, causal=True, window=None, interpret=True)
  real = (segments != 0)[..., None, None]

  def gradients(f):
    return jax.grad(lambda *qkv: (jnp.cos(f(*qkv)) * real).sum(), argnums=(0, 1, 2))

  ours = lambda q, k, v: splash.attention(q, k, v, segments, spec)
  mask = masks.visible(segments, causal=True, window=None)
  by_reference = lambda q, k, v: reference.attention(q, k, v, mask, scale=0.3)
  got, want = gradients(ours)(q, k, v), gradients(by_reference)(q, k, v)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got, want)
  parts = (2, 2, 4, 256, 128)  # rows, blocks of keys, heads, tokens, entries of a head
  assert parts not in sums(gradients(ours), q, k, v)
  monkeypatch.setattr(splash, "adding", lambda fn: fn)
  assert parts in sums(gradients(ours), q, k, v)
