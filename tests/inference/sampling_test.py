"""Sampling rules against NumPy, and penalties against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.inference import sampling

LOGITS = jnp.log(jnp.array([[0.5, 0.2, 0.15, 0.1, 0.05], [0.1, 0.1, 0.6, 0.1, 0.1]]))


def in_rows(s, num_rows):
  """Settings for each of a number of rows."""
  return jax.tree.map(lambda x: jnp.broadcast_to(x, num_rows), s)


def kept(logits=LOGITS, **rules):
  s = in_rows(sampling.Sampling(1.0)._replace(**rules), len(logits))
  out = jax.jit(sampling.filter_logits)(logits, s.top_k, s.top_p, s.min_p)
  return [np.flatnonzero(np.isfinite(row)).tolist() for row in out]


@pytest.mark.parametrize(
  "rules, want",
  [
    (dict(), [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
    (dict(top_k=2), [[0, 1], [0, 1, 2, 3, 4]]),  # ties with the second stay
    (dict(top_k=99), [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
    (dict(top_p=0.6), [[0, 1], [2]]),
    (dict(top_p=1e-9), [[0], [2]]),
    (dict(min_p=0.35), [[0, 1], [2]]),
    (dict(top_k=3, top_p=0.8), [[0, 1], [0, 1, 2, 3, 4]]),  # p of what top_k left: 0.59, 0.82
  ],
)
def test_filters_keep_what_their_definitions_say(rules, want):
  assert kept(**rules) == want


def definition(logits, s):
  """Probabilities of the tokens, in NumPy and float64, by the rules' definitions."""
  z = np.asarray(logits, np.float64) / s.temperature
  if 0 < s.top_k < len(z):
    z = np.where(z >= np.sort(z)[-s.top_k], z, -np.inf)
  p = np.exp(z - z.max())
  p /= p.sum()
  order = np.argsort(-p, kind="stable")
  reached = np.cumsum(p[order]) - p[order]
  least = p[order][max((reached < s.top_p).sum(), 1) - 1]
  p = np.where((p >= least) & (p >= s.min_p * p.max()), p, 0)
  return p / p.sum()


def is_likely(counts, p):
  """Whether counts of draws are within 5 standard deviations of a chi-square's mean."""
  assert not counts[p == 0].any(), "a token was drawn that the rules exclude"
  n, seen = counts.sum(), p * counts.sum() >= 5
  chi = ((counts - n * p)[seen] ** 2 / (n * p)[seen]).sum()
  rest = (n * p)[~seen].sum()
  chi += (counts[~seen].sum() - rest) ** 2 / max(rest, 5)
  freedom = seen.sum()
  return chi < freedom + 5 * (2 * freedom) ** 0.5


RULES = [
  dict(),
  dict(temperature=0.5),
  dict(temperature=1.7, top_k=5),
  dict(top_p=0.7),
  dict(top_p=0.999),  # more than the candidates that are sorted first
  dict(min_p=0.05),
  dict(top_k=30, top_p=0.95, min_p=0.001),
]


def test_draws_have_the_distribution_of_the_definition(monkeypatch):
  # Small sizes have the cases of a large vocabulary.
  monkeypatch.setattr(sampling, "_CANDIDATES", 8)
  monkeypatch.setattr(sampling, "_GROUP", 6)
  V = 40
  logits = np.random.default_rng(V).normal(size=V).astype(np.float32) * 2
  draw = jax.jit(
    lambda z, u, s: sampling.sample(jnp.broadcast_to(z, (len(u), V)), u, in_rows(s, len(u)))
  )
  for i, rules in enumerate(RULES):
    s = sampling.Sampling(1.0)._replace(**rules)
    uniform = np.random.default_rng(i).random((100_000, 2), np.float32)
    counts = np.bincount(draw(logits, uniform, s), minlength=V)
    assert is_likely(counts, definition(logits, s)), rules
    other = s._replace(temperature=s.temperature * 1.1)
    assert not is_likely(counts, definition(logits, other)), "the test tells distributions apart"


def test_a_row_is_drawn_as_if_alone():
  rng = np.random.default_rng(0)
  B, V = 8, 700
  logits = (rng.normal(size=(B, V)) * 2).astype(np.float32)
  uniform = rng.random((B, 2), np.float32)
  several = sampling.Sampling(
    *(
      np.array(x, np.int32 if i == 1 else np.float32)
      for i, x in enumerate(
        (
          [1, 0, 0.7, 1, 1, 2, 1, 1],
          [0, 0, 5, 300, 0, 0, 7, 0],
          [1, 1, 0.9, 1, 0.999, 0.5, 1, 1],
          [0, 0, 0, 0, 0, 0, 0.1, 0.2],
          *[[0] * B] * 3,
        )
      )
    )
  )

  @jax.jit
  def step(z, s):
    return sampling.sample(z, uniform, s), sampling.filter_logits(z, s.top_k, s.top_p, s.min_p)

  together = step(logits, several)
  for i in range(B):
    greedy = in_rows(sampling.Sampling(0.0), B)
    alone = step(
      logits, jax.tree.map(lambda x, y, i=i: np.array(x.at[i].set(y[i])), greedy, several)
    )
    for a, b in zip(alone, together, strict=True):
      np.testing.assert_array_equal(a[i], b[i])


def test_equally_likely_tokens_are_all_kept():
  assert [len(row) for row in kept(jnp.zeros((1, 500)), top_k=2)] == [500]
  assert [len(row) for row in kept(jnp.zeros((1, 500)), top_p=0.1)] == [500]


def test_draws_of_uniforms_next_to_the_edges_are_tokens_with_a_probability():
  logits = jnp.full((2, 300), -jnp.inf).at[:, 5].set(0.0).at[:, 140].set(0.0)
  uniform = jnp.array([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]])
  drawn = sampling.sample(logits, uniform, in_rows(sampling.Sampling(1.0), 2))
  assert drawn.tolist() == [5, 140]
  assert sampling.sample(logits, uniform, in_rows(sampling.Sampling(0.0), 2)).tolist() == [5, 5]


def test_a_penalty_for_repetition_is_that_of_transformers():
  logits = jax.random.normal(jax.random.key(0), (3, 30))
  tokens = np.array([[1, 2, 2], [7, 7, 7], [29, 0, 4]])
  seen = np.zeros((3, 30), bool)
  np.put_along_axis(seen, tokens, True, axis=1)
  none = np.zeros((3, 30), np.int32)
  s = in_rows(sampling.Sampling(repetition_penalty=1.7), 3)
  got = sampling.penalized(logits, seen, none, s)
  np.testing.assert_array_equal(got, sampling.penalized(logits, ~seen & False, none + seen, s))
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)
  want = theirs(torch.tensor(tokens), torch.tensor(np.asarray(logits)))
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_penalties_for_presence_and_frequency_are_subtracted_from_the_text_s_tokens():
  counts = np.array([[0, 1, 3]])
  s = in_rows(sampling.Sampling(presence_penalty=0.5, frequency_penalty=0.25), 1)
  got = sampling.penalized(jnp.ones((1, 3)), np.ones((1, 3), bool), counts, s)
  np.testing.assert_allclose(got, [[1, 1 - 0.75, 1 - 1.25]])
