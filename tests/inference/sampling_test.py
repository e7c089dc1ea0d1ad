"""Sampling rules against NumPy, and sampled text against the model's own probabilities."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.inference import sampling
from jaxgpt.model import transformer

LOGITS = jnp.log(jnp.array([[0.5, 0.2, 0.15, 0.1, 0.05], [0.1, 0.1, 0.6, 0.1, 0.1]]))


def kept(**rules):
  rules = dict(top_k=0, top_p=1.0, min_p=0.0) | rules
  out = jax.jit(sampling.filter_logits)(LOGITS, **rules)
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


def test_draws_follow_the_probabilities():
  logits = jnp.broadcast_to(LOGITS[:1], (20_000, 5))
  drawn = sampling.sample(logits, jax.random.key(0), 1.0, 0, 1.0, 0.0)
  share = np.bincount(np.asarray(drawn), minlength=5) / 20_000
  np.testing.assert_allclose(share, [0.5, 0.2, 0.15, 0.1, 0.05], atol=0.015)
  assert (sampling.sample(logits, jax.random.key(0), 0.0, 0, 1.0, 0.0) == 0).all()


@pytest.fixture(scope="module")
def sampler():
  c = config.base()
  c.model.update(dict(vocab_size=30, max_len=16, num_layers=2, width=32, num_heads=4, init_std=0.5))
  c.data.seq_len = 16
  model = transformer.Transformer(ml_collections.FrozenConfigDict(config.resolve(c).model))
  params = transformer.init(model, jax.random.key(0))
  return model, params, sampling.make(model, 16, eos_id=29, vocab_size=30)


def run(sampler, prompt, max_new=99, temperature=0.0, seed=0, rows=1):
  _, params, sample = sampler
  tokens = np.zeros((rows, 16), np.int32)
  tokens[:, : len(prompt)] = prompt
  out, lengths = sample(
    params, tokens, len(prompt), max_new, jax.random.key(seed), (temperature, 0, 1.0, 0.0)
  )
  return [row[:n].tolist() for row, n in zip(np.asarray(out), np.asarray(lengths), strict=True)]


@pytest.mark.parametrize("prompt", [[1], [3, 4, 5, 6], list(range(15))])
def test_greedy_decoding_equals_the_argmax_of_full_forwards(sampler, prompt):
  model, params, _ = sampler
  want = list(prompt)
  forward = jax.jit(lambda t: model.apply({"params": params}, t, jnp.arange(16)[None]).logits)
  while len(want) < 16:
    padded = jnp.array([want + [0] * (16 - len(want))])
    token = int(forward(padded)[0, len(want) - 1].argmax())
    if token == 29:
      break
    want.append(token)
  (got,) = run(sampler, prompt)
  assert got == want


def test_prompts_of_several_lengths_in_a_batch_are_continued_as_each_alone(sampler):
  prompts = [[1], [3, 4, 5, 6], list(range(15)), [2, 2]]
  for max_new in (99, 4):
    tokens = np.full((4, 16), 7, np.int32)  # what follows a prompt is ignored
    for row, prompt in zip(tokens, prompts, strict=True):
      row[: len(prompt)] = prompt
    out, lengths = sampler[2](
      sampler[1],
      tokens,
      np.array([len(prompt) for prompt in prompts]),
      max_new,
      jax.random.key(0),
      (0.0, 0, 1.0, 0.0),
    )
    got = [row[:n].tolist() for row, n in zip(np.asarray(out), np.asarray(lengths), strict=True)]
    assert got == [run(sampler, prompt, max_new)[0] for prompt in prompts]


def test_prompt_lengths_and_settings_share_one_compile(sampler):
  run(sampler, [1, 2], temperature=0.7)
  before = sampler[2]._cache_size()
  run(sampler, [1, 2, 3, 4, 5], max_new=3, temperature=1.3, seed=4)
  assert sampler[2]._cache_size() == before


def test_samples_end_at_max_new_and_at_the_context(sampler):
  assert len(run(sampler, [1, 2], max_new=3)[0]) <= 5
  assert len(run(sampler, [1, 2], max_new=500)[0]) <= 16


def test_token_ids_that_pad_the_embedding_are_never_drawn(sampler):
  model, params, _ = sampler
  sample = sampling.make(model, 16, eos_id=4, vocab_size=5)
  tokens, lengths = sample(
    params, np.ones((8, 16), np.int32), 1, 15, jax.random.key(0), (5.0, 0, 1.0, 0.0)
  )
  drawn = np.concatenate([row[1:n] for row, n in zip(np.asarray(tokens), lengths, strict=True)])
  assert drawn.size and drawn.max() < 4


def test_each_of_several_end_tokens_ends_a_sample(sampler):
  model, params, _ = sampler
  (whole,) = run(sampler, [1, 2])
  ends = [whole[5], whole[8]]
  sample = sampling.make(model, 16, eos_id=ends, vocab_size=30)
  first = next(i for i, token in enumerate(whole) if i >= 2 and token in ends)
  assert run((model, params, sample), [1, 2]) == [whole[:first]]


def test_a_penalty_for_repetition_is_that_of_transformers(sampler):
  logits = jax.random.normal(jax.random.key(0), (3, 30))
  tokens = np.array([[1, 2, 2], [7, 7, 7], [29, 0, 4]])
  seen = np.zeros((3, 30), bool)
  np.put_along_axis(seen, tokens, True, axis=1)
  got = sampling.penalized(logits, seen, 1.7)
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)
  want = theirs(torch.tensor(tokens), torch.tensor(np.asarray(logits)))
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_penalty_counts_the_prompt_and_the_tokens_drawn(sampler):
  _, params, sample = sampler
  tokens = np.zeros((1, 16), np.int32)
  tokens[:, :3] = [3, 4, 5]
  settings = sampling.Sampling(temperature=0.0, repetition_penalty=1e6)
  out, (length,) = sample(params, tokens, 3, 99, jax.random.key(0), settings)
  drawn = out[0, :length].tolist()
  assert len(set(drawn)) == len(drawn) > 3, "so high a penalty excludes all tokens so far"


def test_each_seed_and_row_draws_different_text(sampler):
  a, b = run(sampler, [1, 2], temperature=2.0, rows=2)
  assert a != b
  assert run(sampler, [1, 2], temperature=2.0, rows=2) == [a, b]
  assert run(sampler, [1, 2], temperature=2.0, rows=2, seed=1) != [a, b]
