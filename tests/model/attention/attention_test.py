"""Every attention implementation against a loop over queries in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.model import self_attention
from jaxgpt.model.attention import attention, batched, masks, reference
from jaxgpt.model.attention.kernels import splash
from jaxgpt.model.attention.spec import Spec
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel import sharding
from tests import quick


def inputs(B=2, T=7, N=4, K=2, H=8):
  keys = jax.random.split(jax.random.key(0), 4)
  q = jax.random.normal(keys[0], (B, T, N, H))
  k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[1:3])
  mask = jax.random.bernoulli(keys[3], 0.6, (B, T, T)).at[0, 3].set(False)
  return q, k, v, mask


def by_definition(q, k, v, mask, scale, softcap):
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  group = q.shape[2] // k.shape[2]
  for b, t, n in np.ndindex(q.shape[:3]):
    keys = np.flatnonzero(mask[b, t])
    if keys.size:
      logits = k[b, keys, n // group] @ q[b, t, n] * scale
      logits = softcap * np.tanh(logits / softcap) if softcap else logits
      weights = np.exp(logits - logits.max())
      out[b, t, n] = weights @ v[b, keys, n // group] / weights.sum()
  return out


@pytest.mark.parametrize("form", ["reference", "batched"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_forms_agree_with_the_definition(form, softcap, heads):
  q, k, v, mask = inputs(N=heads[0], K=heads[1])
  out = attention.attend(form, q, k, v, mask, None, Spec(0.3, softcap))
  np.testing.assert_allclose(out, by_definition(q, k, v, np.asarray(mask), 0.3, softcap), atol=1e-5)


@pytest.mark.parametrize("T, softcap", quick.first([(12, 2.0), (12, None), (7, None), (8, 2.0)], 2))
def test_causal_chunks_skip_only_masked_keys(T, softcap, monkeypatch):
  monkeypatch.setattr(batched, "_CHUNK", 4)
  monkeypatch.setattr(batched, "_MAX_CHUNKS", 2)
  q, k, v, mask = inputs(T=T)
  mask &= jnp.tril(jnp.ones((T, T), bool))

  def both(f):
    out, vjp = jax.vjp(lambda q, k, v: f(q, k, v, mask, scale=0.3, softcap=softcap), q, k, v)
    return out, vjp(jnp.cos(out))

  got = both(functools.partial(batched.attention, causal=True))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, both(reference.attention)
  )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("form", ["reference", "batched"])
def test_gradients_agree_and_a_query_without_keys_has_none(form, softcap):
  q, k, v, mask = inputs()

  def loss(form):
    return lambda q, k, v: jnp.sin(
      attention.attend(form, q, k, v, mask, None, Spec(0.3, softcap))
    ).sum()

  got = jax.grad(loss(form), (0, 1, 2))(q, k, v)
  want = jax.grad(loss("reference"), (0, 1, 2))(q, k, v)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
  assert np.isfinite(got[0]).all() and not got[0][0, 3].any()


def test_heads_that_do_not_divide_raise_an_error():
  q, k, v, mask = inputs(N=4, K=3)
  with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
    reference.attention(q, k, v, mask, scale=1.0)


@pytest.mark.parametrize(
  "fields",
  [
    dict(causal=True, window=40, softcap=2.0, K=1),
    pytest.param(dict(causal=True), marks=pytest.mark.slow),
    pytest.param(dict(causal=True, window=40), marks=pytest.mark.slow),
    pytest.param(dict(causal=False, window=40), marks=pytest.mark.slow),
    pytest.param(dict(causal=True, softcap=2.0, K=1), marks=pytest.mark.slow),
  ],
)
def test_splash_agrees_with_the_reference(fields):
  T = 256
  fields = dict(fields)
  q, k, v, _ = inputs(T=T, K=fields.pop("K", 2))
  segments = jnp.array([[1] * 100 + [2] * 100 + [0] * 56, [1] * T])
  spec = Spec(scale=0.3, interpret=True, **fields)
  mask = masks.visible(segments, causal=spec.causal, window=spec.window)
  real = (segments != 0)[..., None, None]

  def both(f):
    out, vjp = jax.vjp(lambda q, k, v: f(q, k, v) * real, q, k, v)
    return out, vjp(jnp.cos(out) * real)

  got = both(lambda q, k, v: splash.attention(q, k, v, segments, spec))
  want = both(lambda q, k, v: reference.attention(q, k, v, mask, scale=0.3, softcap=spec.softcap))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def test_heads_prepared_for_splash_agree_with_the_reference():
  T = 128
  q, k, v, _ = inputs(T=T)
  segments = jnp.ones((2, T), jnp.int32)
  spec = Spec(scale=0.3, causal=True, interpret=True)

  def splash_out(*qkv):
    ready, without_scale = attention.prepared("splash", qkv, spec)
    assert all(x.shape[-1] == splash.LANES for x in ready)
    out = attention.attend("splash", *ready, None, segments, without_scale)
    return out[..., : v.shape[-1]]

  mask = masks.visible(segments, causal=True)
  want = lambda *qkv: reference.attention(*qkv, mask, scale=0.3)
  of = lambda f: jax.value_and_grad(lambda *qkv: jnp.sin(f(*qkv)).sum(), (0, 1, 2))(q, k, v)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), of(splash_out), of(want))


def test_heads_for_splash_are_saved_as_its_kernels_read_them():
  q = inputs()[0]

  def saved(heads_first):
    mark = functools.partial(self_attention.mark, rules=sharding.DEFAULT, heads_first=heads_first)
    program = jax.make_jaxpr(lambda x: mark((x, 2 * x, 3 * x)))(q)
    return [e.outvars[0].aval.shape for e in program.eqns if e.primitive.name == "name"]

  B, T, N, H = q.shape
  assert saved(True) == [(B, N, T, H)] * 3
  assert saved(False) == [(B, T, N, H)] * 3


def test_splash_under_a_mesh():
  q, k, v, _ = inputs(B=4, T=256)
  segments = jnp.ones((4, 256), jnp.int32).at[:, 200:].set(2)
  spec = Spec(scale=0.3, causal=True, interpret=True)
  run = jax.jit(functools.partial(splash.attention, spec=spec))
  c = config.base().mesh
  c.update(dict(data=4, fsdp=1, tensor=2))
  with jax.set_mesh(mesh_lib.make(c)):
    got = run(q, k, v, segments)
  want = reference.attention(q, k, v, masks.visible(segments, causal=True), scale=0.3)
  np.testing.assert_allclose(got, want, atol=1e-5)
