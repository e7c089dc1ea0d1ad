"""The engine with drafts next to the engine without."""

import functools

import jax
import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.inference.engine import engine as engine_lib
from jaxgpt.inference.engine.drafting.drafter import Drafting
from jaxgpt.inference.engine.requests import Request
from jaxgpt.inference.sampling import Sampling
from tests import quick
from tests.inference.engine.engine_test import (
  CONTEXT,
  GREEDY,
  SETTINGS,
  answers,
  bits,
  made,
  prompt,
)
from tests.inference.sampling_test import definition, is_likely

K = 3
SIZES = dict(max_rows=3, block_size=8, cache_tokens=96)


@functools.cache
def drafting_engine(kind, draft):
  """An engine whose drafts come from the model itself, from a similar one, or from n-grams."""
  run, _ = made(kind)
  noise = lambda x: 0.05 * jax.random.normal(jax.random.key(x.size), x.shape)
  noisy = jax.jit(lambda params: jax.tree.map(lambda x: x + noise(x), params))
  by = {
    "ngram": lambda: None,
    "itself": lambda: run,
    "similar": lambda: run._replace(params=noisy(run.params)),
  }
  chunks = (1, 2) if kind == "local" else (2, 2)
  return engine_lib.Engine(run, drafting=Drafting(K, by[draft]()), chunk_blocks=chunks, **SIZES)


def accepted(engine, requests):
  """(answers, drafted tokens, those that were accepted)."""
  before = engine.stats()
  found = answers(engine, requests)
  after = engine.stats()
  return found, after.drafted - before.drafted, after.accepted - before.accepted


@pytest.mark.parametrize(
  "kind, draft",
  [
    pytest.param("gpt2", "similar", marks=pytest.mark.slow),
    ("gpt2", "ngram"),
    pytest.param("local", "ngram", marks=pytest.mark.slow),
  ],
)
def test_greedy_texts_are_those_of_the_engine_without_drafts(kind, draft):
  prompts = [prompt(n, n) for n in (1, 5, 9, 17, 40, 33, 46)]
  prompts[3:3] = [prompts[4][:20] + (7, 8, 9), prompts[4], (5, 6, 7, 8) * 5]
  asked = [Request(ids, 14, GREEDY, stop=("e",) if i % 2 else ()) for i, ids in enumerate(prompts)]
  want = answers(made(kind)[1], asked)
  got, drafted, taken = accepted(drafting_engine(kind, draft), asked)
  assert got == want
  assert 0 < taken < drafted


@pytest.mark.parametrize("draft", quick.first(["ngram", "similar"], 1))
def test_a_text_does_not_depend_on_who_shares_the_batch(draft):
  engine = drafting_engine("gpt2", draft)
  mine = [
    Request(prompt(11 + 5 * i, i), 10, s, seed=i - 1, logprobs=3) for i, s in enumerate(SETTINGS)
  ]
  alone = [bits(answers(engine, [request])[0]) for request in mine]
  others = [Request(prompt(n, 90 + n), 12, Sampling(1.0), seed=n) for n in (30, 2, 19)]
  mixed = [others[0], mine[3], others[1], mine[1], mine[0], others[2], mine[2]]
  found = [bits(answer) for answer in answers(engine, mixed)]
  assert [found[mixed.index(request)] for request in mine] == alone
  if draft == "ngram":  # without a draft a token is drawn as ever
    plain = answers(made("gpt2")[1], mine)
    assert [[t.id for t in tokens][:1] for tokens, _, _ in plain] == [
      [t[0] for t in tokens][:1] for tokens, _, _ in alone
    ]


def test_drafts_of_the_model_itself_are_accepted():
  """The two distributions meet at each position, with penalties and filters too."""
  engine = drafting_engine("gpt2", "itself")
  more = [Sampling(1.0, top_k=40, min_p=0.01), Sampling(0.9, repetition_penalty=1.5)]
  for s in [*SETTINGS, *more]:
    _, drafted, taken = accepted(engine, [Request(prompt(7, 3), 30, s, seed=4)])
    assert 10 < drafted == taken, s


@pytest.mark.slow
def test_sampled_texts_have_the_model_s_distribution():
  run, _ = made("gpt2")
  ids, s, many = prompt(9), Sampling(1.0, top_k=3), 1000
  engine = drafting_engine("gpt2", "similar")
  asked = [Request(ids, 3, s, seed=seed) for seed in range(many)]
  found, drafted, taken = accepted(engine, asked)
  assert 0.1 * drafted < taken < 0.9 * drafted
  counts = {}
  for tokens, _, _ in found:
    pair = tuple(t.id for t in tokens[:2])
    counts[pair] = counts.get(pair, 0) + 1
  V = run.tokenizer.vocab_size
  forward = jax.jit(lambda p, x, at: run.parts.model.apply({"params": p}, x, at).logits)
  at = np.arange(len(ids) + 1)[None]
  first = definition(forward(run.params, np.array([[*ids, 0]]), at)[0, -2, :V], s)
  want = {}
  for token in np.flatnonzero(first):
    after = forward(run.params, np.array([[*ids, token]]), at)[0, -1, :V]
    for other, p in enumerate(definition(after, s)):
      if p:
        want[int(token), other] = first[token] * p
  assert counts.keys() <= want.keys()
  assert is_likely(np.array([counts.get(pair, 0) for pair in want]), np.array([*want.values()]))


def test_few_programs_are_compiled_and_log_probabilities_are_the_model_s():
  engine = drafting_engine("gpt2", "similar")
  ask = Request(prompt(10), 6, GREEDY, logprobs=4)
  ((want, _, _),) = answers(made("gpt2")[1], [ask])
  ((got, _, _),) = answers(engine, [ask])
  for a, b in zip(got, want, strict=True):
    assert (a.id, [i for i, _ in a.alternatives]) == (b.id, [i for i, _ in b.alternatives])
    assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
  programs, drafts = engine._programs, engine._drafter._programs
  sizes = [p._cache_size() for p in (programs.verify, programs.prefill, drafts.propose)]
  assert sizes == [1, 1, 1]
  assert programs.decode._cache_size() == drafts.decode._cache_size() == 0


def test_a_text_alone_needs_no_wide_call_where_nothing_is_drafted():
  run, _ = made("gpt2")
  engine = engine_lib.Engine(
    run, drafting=Drafting(K), chunk_blocks=(2, 2), **SIZES | dict(max_rows=1)
  )
  assert engine._drafter.draft([], np.zeros(1, np.int32), ()) is None


def test_draft_models_that_do_not_fit_are_refused():
  run, _ = made("gpt2")

  class Other(type(run.tokenizer)):
    def encode(self, text, specials=False):
      return super().encode(text, specials)[::-1]

  other = Other()
  other.digest = "0123456789abcdef"

  def changed(section, **values):
    c = run.c.copy_and_resolve_references()
    c[section].update(values)
    return run._replace(c=c)

  for draft, message in (
    (run._replace(tokenizer=other), "--draft: its tokenizer .* is not the run's"),
    (changed("data", seq_len=CONTEXT - 1), f"--draft: its context is {CONTEXT - 1} tokens"),
    (changed("model", vocab_size=100), "--draft: its embedding has 100 rows"),
  ):
    with pytest.raises(UserError, match=message):
      engine_lib.Engine(run, drafting=Drafting(K, draft), **SIZES)
