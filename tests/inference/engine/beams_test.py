"""Beam search against a search over full forwards, and what it leaves behind in any company."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.inference.engine import engine as engine_lib
from jaxgpt.inference.engine import requests
from jaxgpt.inference.engine.beams import Search
from jaxgpt.inference.engine.requests import Beams, Constraint, Request
from jaxgpt.inference.sampling import Sampling
from jaxgpt.model import transformer
from jaxgpt.run import generation
from tests.inference.engine import engine_test
from tests.inference.engine.engine_test import CONTEXT, GREEDY, KINDS, answers, prompt

ENDS = (3, 22, 76, 84, 88, 93, 126, 166)  # of which the models write some
EACH = ["gpt2", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "gpt2")]


@functools.cache
def made(kind):
  """(run, its engine), with ends that are reached."""
  run, _ = engine_test.made(kind)
  run = run._replace(generation=generation.Generation({"eos_token_id": list(ENDS)}))
  return run, engine_lib.Engine(run, max_rows=3, block_size=8, cache_tokens=128)


@functools.cache
def forward(kind):
  """(tokens of 3 rows) -> log-probabilities of the tokens that follow each, from whole rows."""
  run, _ = made(kind)
  positions = np.broadcast_to(np.arange(CONTEXT), (3, CONTEXT))
  model = transformer.dropless(run.parts.model)
  apply = lambda x: model.apply({"params": run.params}, x, positions).logits
  V = run.tokenizer.vocab_size
  return jax.jit(lambda x: jax.nn.log_softmax(apply(x)[..., :V], axis=-1))


def by_full_forwards(kind, ids, new, beams):
  """The best text by the definition: each step scores all continuations of all beams."""
  new = min(new, CONTEXT - len(ids))
  running, ended = [(0.0, ())], []
  for length in range(1, new + 1):
    tokens = np.zeros((3, CONTEXT), np.int32)
    for row, (_, text) in zip(tokens, running):
      row[: len(ids) + len(text)] = ids + text
    logp = np.asarray(forward(kind)(tokens))[:, len(ids) + length - 2]
    scores = np.array([score for score, _ in running])[:, None] + logp[: len(running)]
    order = np.dstack(np.unravel_index(np.argsort(-scores, axis=None), scores.shape))[0]
    best = [(scores[i, v], (*running[i][1], int(v))) for i, v in order[:20]]
    over = lambda text: text[-1] in ENDS or len(text) == new
    done = [
      (s / length**beams.length_penalty, text) for s, text in best[: beams.width] if over(text)
    ]
    ended = sorted(ended + done, key=lambda pair: -pair[0])[: beams.width]
    running = [pair for pair in best if not over(pair[1])][: beams.width]
    if not running:
      break
    if len(ended) == beams.width:
      possible = running[0][0] / length**beams.length_penalty
      if beams.early_stopping or possible <= ended[-1][0]:
        break
  return ended[0][1]


SETTINGS = [
  (Beams(3), 14),
  (Beams(2, length_penalty=0.0), 14),
  (Beams(3, length_penalty=2.0, early_stopping=True), 10),
  (Beams(3, length_penalty=-1.0), 1),
]


@pytest.mark.parametrize("kind", EACH)
def test_texts_are_those_of_a_search_over_full_forwards(kind):
  _, engine = made(kind)
  asked = [
    Request(prompt(n, n), new, GREEDY, beams=beams)
    for n, (beams, new) in zip((5, 17, 9, 8, 1, 44, 16, 2), SETTINGS * 2)
  ]
  want = [by_full_forwards(kind, r.prompt, r.max_new, r.beams) for r in asked]
  greedy = [Request(r.prompt, r.max_new, GREEDY) for r in asked]
  got = answers(engine, [request for pair in zip(asked, greedy) for request in pair])
  for text, (tokens, _, finish) in zip(want, got[::2], strict=True):
    ended = text[-1] in ENDS
    assert [t.id for t in tokens] == list(text[:-1] if ended else text)
    assert finish == (requests.STOP if ended else requests.LENGTH)
  found = [tuple(t.id for t in tokens) for tokens, _, _ in got]
  assert found[::2] != found[1::2], "a search finds other texts than the greedy choice"
  if kind == "gpt2":  # the others happen to write no end
    assert {f for _, _, f in got[::2]} == {requests.STOP, requests.LENGTH}


def test_beams_split_and_end():
  """Two beams of one parent copy its new blocks, not those of the prompt."""
  search = Search(Beams(2, length_penalty=0.0), {9}, 3)
  row = lambda *pairs: tuple(np.array(x) for x in zip(*pairs))
  ids, logp = row((1, -0.1), (2, -0.5), (3, -3.0))
  first = search.advance(ids[None], logp[None].astype(np.float32))
  assert first == [(0, 1), (0, 2)]
  ids = np.array([[4, 9, 5], [6, 7, 8]])
  logp = np.log(np.array([[0.5, 0.3, 0.2], [0.01, 0.02, 0.97]], np.float32))
  # -0.1 + ln 0.5 = -0.79, -0.5 + ln 0.97 = -0.53, and the end, -0.1 + ln 0.3, is not among two.
  assert search.advance(ids, logp) == [(1, 8), (0, 4)] and not search.found
  logp = np.log(np.array([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2]], np.float32))
  assert search.advance(ids, logp) == []
  assert [text.tokens for text in search.found] == [(2, 8, 4), (1, 4, 6)]
  assert search.found[0].score == pytest.approx(-0.5 + np.log(0.97) + np.log(0.6), abs=1e-5)


def test_a_search_that_waits_is_cancelled_or_cut_leaves_nothing():
  _, engine = made("gpt2")
  long = Request(prompt(20, 3), 24, GREEDY, beams=Beams(3))
  numbers = [engine.add(Request(prompt(4, 1), 6, GREEDY)), engine.add(long), engine.add(long)]
  pieces = [p for _ in range(9) for p in engine.step()]
  assert engine.stats().running == 3 and engine.stats().waiting == 1
  engine.cancel(numbers[1])
  pieces += engine.step()
  assert [p.request for p in pieces if p.finish == requests.CANCELLED] == [numbers[1]]
  while engine.busy:
    pieces += engine.step()
  assert {p.request for p in pieces if p.finish} == set(numbers)
  assert engine.stats().blocks_used == 0
  # A stop string cuts the text of the search.
  (whole,) = answers(engine, [long])
  stop = whole[1][3:5]
  (cut,) = answers(engine, [dataclasses.replace(long, stop=(stop,))])
  assert cut[1:] == (whole[1][: whole[1].index(stop)], requests.STOP)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(beams=Beams(19)), "beams=19 must be from 1 to 12"),
    (dict(beams=Beams(4)), "beams=4 need 4 rows of the batch, which has 3"),
    (dict(beams=Beams(2, length_penalty=float("nan"))), "length_penalty=nan must be finite"),
    (dict(sampling=Sampling(temperature=0.5)), "beams draw nothing: .*temperature=0.5"),
    (dict(sampling=GREEDY._replace(repetition_penalty=1.2)), "repetition_penalty=1.2"),
    (dict(logprobs=2), "beams do not go with logprobs"),
    (dict(constraint=Constraint.of_regex("a")), "beams do not go with a prescribed form"),
  ],
)
def test_what_a_search_cannot_do_is_refused(changes, message):
  _, engine = made("gpt2")
  usual = {"prompt": (1, 2), "max_new": 3, "sampling": GREEDY, "beams": Beams(2)}
  request = Request(**usual | changes)
  with pytest.raises(UserError, match=message):
    engine.check(request)
