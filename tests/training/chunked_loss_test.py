"""The loss in chunks is the loss: value and gradients, on any mesh, and its memory is a chunk's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel import sharding
from jaxgpt.training import build, chunked_loss, losses

B, T, D, V = 8, 16, 32, 48


@pytest.fixture(scope="module")
def arrays():
  """(hidden states, weight, bias, targets, weights of the predictions)."""
  keys = jax.random.split(jax.random.key(0), 5)
  return (
    jax.random.normal(keys[0], (B, T, D)),
    jax.random.normal(keys[1], (D, V)) * 0.3,
    jax.random.normal(keys[2], (V,)),
    jax.random.randint(keys[3], (B, T), 0, V),
    jax.random.uniform(keys[4], (B, T)),
  )


def by_definition(x, w, bias, targets, weights, softcap, z_loss, smoothing):
  logits = x @ w
  logits = logits if bias is None else logits + bias
  logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
  wanted = (1 - smoothing) * jax.nn.one_hot(targets, V) + smoothing / V
  nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
  smooth = -(wanted * jax.nn.log_softmax(logits)).sum(-1)
  z = jax.nn.logsumexp(logits, -1)
  return ((smooth + z_loss * z**2) * weights).sum(), (nll * weights).sum()


@pytest.mark.parametrize(
  "softcap, z_loss, smoothing, has_bias, chunk",
  [(None, 0.0, 0.0, False, 5), (5.0, 0.1, 0.2, True, 3), (None, 0.1, 0.0, False, 10**6)],
)
@pytest.mark.parametrize(
  "axes, rules",
  [
    ({}, {}),
    (dict(fsdp=4, tensor=2), {}),
    (dict(data=2, seq=2, fsdp=2), {}),
    (dict(expert=2, tensor=4), {}),
    (dict(fsdp=4, tensor=2), dict(vocab="fsdp", embed="tensor")),
    (dict(fsdp=2, tensor=2, seq=2), dict(vocab="tensor,seq,fsdp", embed="none")),
  ],
)
def test_value_and_gradients_are_those_of_the_definition(
  arrays, axes, rules, softcap, z_loss, smoothing, has_bias, chunk
):
  x, w, bias, targets, weights = arrays
  bias = bias if has_bias else None
  what = (0, 1, 2) if has_bias else (0, 1)
  chunked = lambda x, w, bias: chunked_loss.loss_sums(x, w, bias, targets, weights, terms)
  plain = lambda x, w, bias: by_definition(x, w, bias, targets, weights, softcap, z_loss, smoothing)
  c = config.base().mesh
  c.update(dict(fsdp=1, rules=rules) | axes)
  terms = chunked_loss.Options(chunk, softcap, z_loss, False, sharding.rules(c), smoothing)
  mesh = mesh_lib.make(c, jax.devices()[: 8 if axes else 1])
  with jax.set_mesh(mesh):
    tripled = lambda f: jax.jit(jax.grad(lambda *args: 3 * f(*args)[0], what))
    got = jax.jit(chunked)(x, w, bias), tripled(chunked)(x, w, bias)
    want = jax.jit(plain)(x, w, bias), tripled(plain)(x, w, bias)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_memory_is_that_of_a_chunk(arrays):
  """With GPT-2's vocabulary: 512 tokens' logits take 103 MB, those of 64 a fraction of it."""
  x, w = jnp.zeros((2, 256, D)), jnp.zeros((D, 50257))
  targets, weights = jnp.zeros((2, 256), jnp.int32), jnp.ones((2, 256))

  def temporaries(loss):
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  terms = chunked_loss.Options(64, None, 0.0, False, sharding.DEFAULT)
  in_chunks = temporaries(
    lambda x, w: chunked_loss.loss_sums(x, w, None, targets, weights, terms)[0]
  )
  whole = temporaries(lambda x, w: losses.cross_entropy(x @ w, targets)[0].sum())
  assert whole > 2 * 256 * 50257 * 4 and in_chunks < whole / 2


def test_only_language_models_have_a_chunked_loss():
  c = config.base()
  c.objective.update(dict(name="classification", loss_chunk=64))
  c.model.update(dict(head="classifier", causal=False))
  with pytest.raises(UserError, match=r"objective.loss_chunk=64 is for causal_lm and masked_lm"):
    build.check(c)
