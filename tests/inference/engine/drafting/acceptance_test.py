"""Texts with drafts have the distribution of the model, whatever the drafts are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.inference.engine.drafting import acceptance
from jaxgpt.inference.sampling import Sampling
from tests.inference.sampling_test import definition, in_rows, is_likely

V, K, B, LENGTH = 6, 2, 50_000, 2  # 1e5 tokens are drawn
RNG = np.random.default_rng(0)
MODEL = (2 * RNG.normal(size=(V, V))).astype(np.float32)  # logits after each token
DRAFT = (MODEL + 1.5 * RNG.normal(size=(V, V))).astype(np.float32)
START = 2


@functools.partial(jax.jit, static_argnames="is_certain")
def texts(key, s, start, room, is_certain):
  """(the first `LENGTH` tokens of B texts after one, drafts that were taken)."""
  s = in_rows(s, B)
  model, draft = jnp.asarray(MODEL), jnp.asarray(DRAFT)

  def one(carry, key):
    out, length, last, taken = carry
    draw, accept, follow = jax.random.split(key, 3)
    drafted, probs = [], []
    for each in jax.random.split(draw, K):
      logits = draft[drafted[-1] if drafted else last]
      random = jax.random.categorical(each, logits, axis=-1)
      drafted.append(logits.argmax(-1) if is_certain else random)
      probs.append(jax.nn.softmax(logits))
    tokens = jnp.stack(drafted, 1).astype(jnp.int32)
    probs = None if is_certain else jnp.stack(probs, 1)
    scores = model[jnp.concatenate([last[:, None], tokens], 1)]
    uniforms = jax.random.uniform(accept, (B, K + 1)), jax.random.uniform(follow, (B, K + 1, 2))
    drafts = acceptance.Drafts(tokens, jnp.full(B, room), probs)
    tokens, num = acceptance.accept(scores, drafts, *uniforms, s)
    put = lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,))
    out = jax.vmap(put)(out, tokens, jnp.minimum(length, LENGTH))
    last = jnp.take_along_axis(tokens, num[:, None] - 1, 1)[:, 0]
    return (out, length + num, last, taken + (num - 1).sum()), None

  out, length = jnp.zeros((B, LENGTH + K + 1), jnp.int32), jnp.zeros(B, jnp.int32)
  begin = out, length, jnp.full(B, start, jnp.int32), jnp.int32(0)
  # Each round writes a token at least.
  (out, _, _, taken), _ = jax.lax.scan(one, begin, jax.random.split(key, LENGTH))
  return out[:, :LENGTH], taken


RULES = [
  (dict(), K),
  (dict(temperature=0.6, top_p=0.8), 1),
  (dict(top_k=3, min_p=0.05), K),
  (dict(temperature=0.0), K),
]


@pytest.mark.slow
@pytest.mark.parametrize("is_certain", [False, True])
def test_texts_have_the_model_s_distribution(is_certain):
  for i, (rules, room) in enumerate(RULES[2 * is_certain :]):
    s = Sampling(1.0)._replace(**rules)
    found, taken = texts(jax.random.key(i), s, START, room, is_certain)
    counts = np.bincount(V * found[:, 0] + found[:, 1], minlength=V * V)
    assert is_likely(counts, pairs(s)), rules
    assert not s.temperature or 0.05 * B < taken < 0.95 * B * LENGTH * room, (
      "some are taken, and some are not"
    )
    other = s._replace(temperature=s.temperature + 0.1)
    assert not is_likely(counts, pairs(other)), "the test tells distributions apart"


def pairs(s):
  """Probabilities of the first two tokens, [V * V]."""
  after = np.eye(V)[MODEL.argmax(1)]
  if s.temperature:
    after = np.stack([definition(row, s) for row in MODEL])
  return (after[START][:, None] * after).ravel()


def test_drafts_of_the_model_itself_are_taken():
  s = in_rows(Sampling(1.0), 4000)
  scores = jnp.broadcast_to(jnp.asarray(MODEL[:4]), (4000, 4, V))
  uniform = jax.random.uniform(jax.random.key(0), (4000, 4))
  p = jax.nn.softmax(scores[:, :3])
  drafted = jax.random.categorical(jax.random.key(1), scores[:, :3]).astype(jnp.int32)
  drafts = acceptance.Drafts(drafted, jnp.full(4000, 3), p * (1 - 1e-6))
  tokens, num = acceptance.accept(scores, drafts, uniform, jnp.stack([uniform] * 2, -1), s)
  assert (num == 4).all()
  np.testing.assert_array_equal(tokens[:, :3], drafted)
