"""The engine against full forwards of the model, and what a request relies on in any company.

One small engine per kind of model is compiled and shared by the tests. Its blocks are small, so
that prompts of a few tokens have several chunks, and its cache is small, so that requests wait.
"""

import functools
import math
import re

import jax
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.engine import engine as engine_lib
from jaxgpt.inference.engine import programs
from jaxgpt.inference.engine.beams import Beams
from jaxgpt.inference.engine.constraints import Constraint
from jaxgpt.inference.engine.requests import Request
from jaxgpt.inference.sampling import Sampling
from jaxgpt.model import transformer
from jaxgpt.run import generation
from jaxgpt.text.tokenizers.base import ByteTokenizer
from tests.model.transformer_test import STYLES

CONTEXT, ENDS = 48, (2, 77)
KINDS = {
  "gpt2": STYLES["gpt2"],
  "local": STYLES["gemma"] | dict(num_kv_heads=2, num_layers=3),
  "latent": STYLES["latent"]
  | dict(bias=True, attn_softcap=5.0, mlp_pattern=("moe",), moe=dict(experts=4, width=16)),
  "capacity": STYLES["llama"]
  | dict(mlp_pattern=("moe",), moe=dict(experts=4, width=16, capacity=0.5)),
}
GREEDY = Sampling(temperature=0.0)


@functools.cache
def made(kind, **sizes):
  """(run, its engine) on one device, or on a mesh of these sizes."""
  c = config.base()
  c.mesh.update(sizes)
  c.model.update(
    dict(vocab_size=300, max_len=CONTEXT, num_layers=2, width=32, num_heads=4, init_std=0.3)
    | KINDS[kind]
  )
  c.data.update(dict(seq_len=CONTEXT, path=""))
  c = config.resolve(c)
  mesh, parts = load.place(c, jax.devices()[: math.prod(sizes.values())])
  assert all(mesh.shape[axis] == size for axis, size in sizes.items())

  @jax.jit
  def initial():
    params = transformer.init(parts.model, jax.random.key(0))
    # Biases are 0 at first, and would not be tested.
    noise = lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    return jax.tree.map(lambda x: x + noise(x), params)

  with jax.set_mesh(mesh):
    params = initial()
  ends = generation.Generation({"eos_token_id": list(ENDS)})
  run = load.Run(c, parts, mesh, params, 0, ByteTokenizer(), "", ends)
  chunks = {"gpt2": (2, 2), "local": (1, 2)}.get(kind, (1, 1))
  return run, engine_lib.Engine(run, max_rows=3, block_size=8, cache_tokens=96, chunk_blocks=chunks)


@pytest.fixture
def engine():
  return made("gpt2")[1]


def prompt(length, seed=0):
  return tuple(np.random.default_rng(seed).integers(3, 250, length).tolist())


def answers(engine, requests):
  """(tokens, text, finish) of each request."""
  first, found = None, {}
  for piece in engine.run(requests):
    found.setdefault(piece.request, []).append(piece)
  first = min(found)
  out = []
  for number in range(first, first + len(found)):
    pieces = found[number]
    assert [p.finish for p in pieces[:-1]] == [None] * (len(pieces) - 1) and pieces[-1].finish
    assert all(p.text == "".join(t.text for t in p.tokens) for p in pieces)
    tokens = [t for p in pieces for t in p.tokens]
    assert all(t.id < ByteTokenizer().vocab_size for t in tokens), "ids that pad the embedding"
    out.append((tokens, "".join(p.text for p in pieces), pieces[-1].finish))
  assert engine.stats().blocks_used == 0 and not engine.busy
  return out


def by_full_forwards(run, prompts, new):
  """The most likely tokens after prompts, from the model's logits of whole rows."""
  tokens, ends = np.zeros((len(prompts), CONTEXT), np.int32), [len(p) for p in prompts]
  for row, ids in zip(tokens, prompts, strict=True):
    row[: len(ids)] = ids
  positions = np.broadcast_to(np.arange(CONTEXT), tokens.shape)
  forward = jax.jit(lambda p, x: run.parts.model.apply({"params": p}, x, positions).logits)
  going = dict(enumerate(prompts))
  for _ in range(new):
    logits = np.asarray(forward(run.params, tokens))[..., : run.tokenizer.vocab_size]
    for i in list(going):
      token = int(logits[i, ends[i] - 1].argmax())
      if token in ENDS:
        del going[i]
        continue
      tokens[i, ends[i]] = token
      ends[i] += 1
      if ends[i] == CONTEXT:
        del going[i]
  return [row[len(p) : end].tolist() for row, p, end in zip(tokens, prompts, ends, strict=True)]


@pytest.mark.parametrize(
  "kind", ["gpt2", *(pytest.param(k, marks=pytest.mark.slow) for k in ("local", "latent"))]
)
def test_greedy_texts_are_the_most_likely_tokens_of_full_forwards(kind):
  run, engine = made(kind)
  prompts = [prompt(n, n) for n in (1, 5, 9, 17, 40, 33, 8)]
  prompts[5:5] = [prompts[4][:20] + (7, 8, 9), prompts[4]]  # begin as the one before
  lengths = [len(p) for p in prompts]
  want = by_full_forwards(run, prompts, 14)
  before = engine.stats()
  got = answers(engine, [Request(ids, 14, GREEDY) for ids in prompts])
  assert [[t.id for t in tokens] for tokens, _, _ in got] == want
  assert len(set(map(tuple, want))) > 6, "the models write different texts"
  after = engine.stats()
  assert after.reused - before.reused >= 16 + 32, "blocks of equal beginnings were computed once"
  assert after.prefilled - before.prefilled + after.reused - before.reused == sum(lengths) - 9
  ended = [f for tokens, _, f in got]
  assert ended == [
    "stop" if len(w) < min(14, CONTEXT - n) else "length" for w, n in zip(want, lengths)
  ]


MESHES = [dict(tensor=2, fsdp=2, data=2), dict(tensor=2, fsdp=1, data=1), dict(fsdp=4, data=2)]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_texts_on_a_mesh_are_those_of_one_device(kind, sizes):
  prompts = [prompt(n, n) for n in (1, 5, 17, 40, 33)]
  asked = [Request(ids, 10, GREEDY) for ids in prompts]
  asked += [Request(ids, 10, Sampling(1.3, top_k=20, top_p=0.9), seed=3) for ids in prompts]
  (_, alone), (_, shared) = made(kind), made(kind, **sizes)
  want, got = answers(alone, asked), answers(shared, asked)
  assert [[t.id for t in tokens] for tokens, _, _ in got] == [
    [t.id for t in tokens] for tokens, _, _ in want
  ]


SETTINGS = [
  GREEDY,
  Sampling(1.0),
  Sampling(1.3, top_k=20, top_p=0.9),
  Sampling(0.7, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
]


def bits(answer):
  tokens, text, finish = answer
  return [(t.id, t.text, t.logprob, t.alternatives) for t in tokens], text, finish


@pytest.mark.parametrize("kind", ["gpt2", "local"])
def test_a_text_does_not_depend_on_who_shares_the_batch(kind):
  _, engine = made(kind)
  mine = [
    Request(prompt(11 + 5 * i, i), 10, s, seed=i - 1, logprobs=3) for i, s in enumerate(SETTINGS)
  ]
  alone = [bits(answers(engine, [request])[0]) for request in mine]
  others = [Request(prompt(n, 90 + n), 12, Sampling(1.0), seed=n) for n in (30, 2, 19, 25, 7)]
  mixed = [
    others[0],
    mine[3],
    others[1],
    mine[1],
    mine[0],
    others[2],
    others[3],
    mine[2],
    others[4],
  ]
  found = [bits(answer) for answer in answers(engine, mixed)]
  assert [found[mixed.index(request)] for request in mine] == alone
  assert bits(answers(engine, [mine[0]])[0]) == alone[0], "with its prompt found in the cache"


def test_experts_drop_no_token_of_a_request_whoever_shares_the_batch():
  run, engine = made("capacity")
  mine = [Request(prompt(n, n), 6, GREEDY, logprobs=0) for n in (2, 6, 3)]
  alone = [answers(engine, [request])[0] for request in mine]
  dropless = run._replace(parts=run.parts._replace(model=transformer.dropless(run.parts.model)))
  want = by_full_forwards(dropless, [request.prompt for request in mine], 6)
  assert [[t.id for t in tokens] for tokens, _, _ in alone] == want
  other = Request(prompt(7, 90), 6, GREEDY)
  together = answers(engine, [other, *mine])[1:]
  for (got, _, _), (tokens, _, _) in zip(together, alone, strict=True):
    assert [t.id for t in got] == [t.id for t in tokens]
    assert [t.logprob for t in got] == pytest.approx([t.logprob for t in tokens], abs=1e-5)


def test_a_penalty_counts_no_token_of_the_steps_in_which_the_prompt_was_computed():
  run, _ = made("gpt2")
  engine = engine_lib.Engine(run, max_rows=3, block_size=8, cache_tokens=144, chunk_blocks=(1, 1))
  for request in (
    Request(prompt(3, 8), 30, GREEDY),
    Request(prompt(3, 9), 30, GREEDY),
    Request(prompt(40, 1), 6, Sampling(0.0, frequency_penalty=1.0)),
  ):
    engine.add(request)
  steps = 0
  while not (row := engine._rows[2]) or not row.written:
    engine.step()
    steps += 1
  assert steps > 3, "others drew tokens while the prompt was computed"
  assert engine._carried.counts[2].sum() == len(row.written) + row.unread


def test_seeds_draw_different_texts_and_equal_seeds_equal_ones(engine):
  ask = lambda seed: Request(prompt(9), 12, Sampling(1.0), seed=seed)
  texts = [text for _, text, _ in answers(engine, [ask(s) for s in (1, 2, 1 + (1 << 32), 1)])]
  assert texts[0] == texts[3] and len(set(texts)) == 3


def test_a_penalty_counts_the_prompt_and_the_tokens_drawn(engine):
  ids = prompt(9)
  ((tokens, _, _),) = answers(engine, [Request(ids, 30, Sampling(0.0, repetition_penalty=1e6))])
  drawn = [t.id for t in tokens]
  assert len({*ids, *drawn}) == len(set(ids)) + len(drawn) > len(set(ids)) + 5


def test_other_weights_find_nothing_in_the_cache_and_are_compiled_no_second_time(engine):
  run, _ = made("gpt2")
  ask = [Request(prompt(33, 1), 6, GREEDY, logprobs=0)]
  before = bits(answers(engine, ask)[0])
  engine.use(jax.tree.map(lambda x: 1.1 * x, run.params))
  reused = engine.stats().reused
  assert bits(answers(engine, ask)[0]) != before
  assert engine.stats().reused == reused
  engine.use(None)
  assert engine._weights is None and engine._carried is None
  engine.use(run.params)
  assert bits(answers(engine, ask)[0]) == before
  programs = engine._programs
  assert programs.decode._cache_size() == programs.prefill._cache_size() == 1
  engine.cancel(engine.add(ask[0]))
  with pytest.raises(ValueError, match="weights cannot change"):
    engine.use(None)
  engine.step()


def test_log_probabilities_are_the_model_s(engine):
  run, _ = made("gpt2")
  ids = prompt(10)
  hot = Sampling(2.0, repetition_penalty=1.5)  # neither changes the log-probabilities
  ((tokens, _, _),) = answers(engine, [Request(ids, 6, hot, seed=3, logprobs=4)])
  whole = np.array([[*ids, *(t.id for t in tokens)]])
  forward = jax.jit(lambda p, *at: run.parts.model.apply({"params": p}, *at).logits)
  logits = forward(run.params, whole, np.arange(whole.shape[1])[None])
  logits = logits[0, :, : run.tokenizer.vocab_size]
  want = jax.nn.log_softmax(logits)[len(ids) - 1 : -1]
  for row, token in zip(np.asarray(want), tokens, strict=True):
    assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
    best = np.argsort(-row)[:4].tolist()
    assert [i for i, _ in token.alternatives] == best
    assert [p for _, p in token.alternatives] == pytest.approx(row[best].tolist(), abs=1e-4)
  ((tokens, _, _),) = answers(engine, [Request(ids, 2, hot)])
  assert tokens[0].logprob is None and not tokens[0].alternatives


def test_a_stop_string_ends_a_text_and_its_row(engine):
  ask = lambda **more: Request(prompt(9), 30, Sampling(1.0, top_k=90), seed=5, **more)
  ((tokens, text, _),) = answers(engine, [ask()])
  stop = re.search("[ -~]{2}", text[2:])[0]
  before = engine.stats().decoded
  ((_, got, finish),) = answers(engine, [ask(stop=("not in it", stop))])
  assert (got, finish) == (text[: text.index(stop)], "stop")
  assert engine.stats().decoded - before < len(tokens), "no token is read after it"


def test_several_texts_of_a_prompt_share_its_blocks(engine):
  ids, before = prompt(33, 33), engine.stats()
  for seed in range(3):
    engine.add(Request(ids, 8, Sampling(1.0), seed=seed))
  engine.step()
  engine.step()
  stats = engine.stats()
  assert stats.running == 3 and stats.blocks_used == 4 + 3, "a text has one block of its own"
  assert stats.prefilled + stats.reused - before.prefilled - before.reused == 3 * 32
  assert stats.reused - before.reused >= 2 * 32
  while engine.busy:
    engine.step()


def test_requests_wait_for_blocks_and_a_cancelled_one_gives_its_own_back(engine):
  long = [engine.add(Request(prompt(40, i), 8, GREEDY)) for i in (1, 2, 3)]  # 6 blocks of 12 each
  for _ in range(3):
    engine.step()
  stats = engine.stats()
  assert (stats.running, stats.waiting, stats.blocks_used) == (2, 1, 12)
  engine.cancel(long[0])
  engine.cancel(12345)
  pieces = engine.step()
  assert [(p.request, p.finish) for p in pieces if p.finish == "cancelled"] == [
    (long[0], "cancelled")
  ]
  assert engine.stats().waiting == 0, "the third has the blocks of the first"
  engine.cancel(long[1])
  last = []
  while engine.busy:
    last += [p for p in engine.step() if p.finish]
  assert {p.request: p.finish for p in last} == {long[1]: "cancelled", long[2]: "length"}
  assert engine.stats().blocks_used == 0


def test_a_request_in_the_queue_can_be_cancelled(engine):
  numbers = [engine.add(Request(prompt(4, i), 3, GREEDY)) for i in range(5)]
  engine.cancel(numbers[4])
  ended = {}
  while engine.busy:
    ended |= {p.request: p.finish for p in engine.step() if p.finish}
  assert ended[numbers[4]] == "cancelled" and ended[numbers[0]] in ("length", "stop")


def test_a_cache_in_int8_takes_half_the_memory_and_changes_little(engine):
  run, _ = made("gpt2")
  sizes = dict(max_rows=3, block_size=8, cache_tokens=96, chunk_blocks=(2, 2))
  rounded = engine_lib.Engine(run, cache_dtype="int8", **sizes)
  mine = [Request(prompt(9 + 4 * i, i), 8, GREEDY, logprobs=0) for i in range(4)]
  exact, found = answers(engine, mine), answers(rounded, mine)
  assert bits(answers(rounded, mine[1:2])[0]) == bits(found[1]), "alone or in company"
  off = [abs(a[0][0].logprob - b[0][0].logprob) for a, b in zip(exact, found)]
  assert 0 < max(off) < 0.05
  held = lambda e: sum(x.nbytes for x in jax.tree.leaves(e._carried.pools))
  share = (8 + 4) / (2 * 8)  # of bfloat16, for heads of 8: an entry has a byte, a vector 4 more
  assert held(rounded) == share * held(engine) / 2


@pytest.mark.parametrize(
  "fault, message",
  [
    (dict(prompt=()), "the prompt has no token"),
    (dict(prompt=(5,) * 48), "the prompt has 48 tokens, the model's context 48 .* at least 1"),
    (dict(prompt=(5, 300)), "no row of its embedding"),
    (dict(prompt=(-1,)), "token id -1"),
    (dict(max_new=0), "max_new=0 must be at least 1"),
    (dict(sampling=Sampling(top_p=2)), "top-p=2 must be"),
    (dict(logprobs=21), "logprobs=21 must be from 0 to 20"),
    (dict(stop=("a", "")), "a stop string is empty"),
  ],
)
def test_a_faulty_request_is_refused(engine, fault, message):
  with pytest.raises(UserError, match=message):
    engine.add(Request(**(dict(prompt=(5,), max_new=3) | fault)))
  assert not engine.busy


def order(engine, monkeypatch, requests):
  """'b' and 'r' for each call that begins or is read while requests are continued, in order."""
  done = ""

  def noted(letter, method):
    def call(*args):
      nonlocal done
      done += letter
      return method(*args)

    return call

  decode, read = engine._programs.decode, jax.device_get
  monkeypatch.setattr(engine._programs, "decode", noted("b", decode))
  monkeypatch.setattr(jax, "device_get", noted("r", read))
  found = answers(engine, requests)
  monkeypatch.undo()
  return done, found


def test_a_call_begins_before_the_tokens_of_the_last_are_read(engine, monkeypatch):
  done, _ = order(engine, monkeypatch, [Request(prompt(5), 4, GREEDY)])
  assert done == "bbrbrbrr", "and none after the last token"
  # A text that ends by itself is in one call more, which nobody waits for.
  (tokens, _, _), *_ = answers(engine, [Request(prompt(5), 9, GREEDY)])
  text = "".join(t.text for t in tokens[:3])
  done, found = order(engine, monkeypatch, [Request(prompt(5), 9, GREEDY, stop=(text,))])
  assert found[0][1:] == ("", "stop") and done == "bbrbrbr"
  # The next request gets the row in the step after the last token, as it would without.
  done, _ = order(engine, monkeypatch, [Request(prompt(5), 2, GREEDY)] * 4)
  assert done == "bbrrbbrr"


def test_ids_that_are_never_drawn_are_no_alternatives():
  logprobs = np.array([[[-0.5, -1.0, -np.inf, -np.inf]]], np.float32)
  drawn = programs.Drawn(
    np.array([[7]]), np.ones(1), logprobs[..., 0], np.arange(4)[None, None], logprobs
  )
  assert drawn.token(0, 0, 4).alternatives == ((0, -0.5), (1, -1.0))


def test_an_interrupted_wait_loses_no_token(engine, monkeypatch):
  request = Request(prompt(5), 6, GREEDY)
  want = bits(answers(engine, [request])[0])
  read, calls = jax.device_get, 0

  def interrupted(x):
    nonlocal calls
    calls += 1
    if calls in (2, 3, 6):
      raise KeyboardInterrupt
    return read(x)

  monkeypatch.setattr(jax, "device_get", interrupted)
  engine.add(request)
  tokens = []
  while engine.busy:
    try:
      for piece in engine.step():
        tokens += piece.tokens
    except KeyboardInterrupt:
      pass
  assert bits((tokens, want[1], want[2])) == want and calls > 6


def test_requests_that_need_their_tokens_enter_beside_others(engine):
  others = [Request(prompt(3, n), 9, GREEDY) for n in (8, 9)]
  for special in (
    Request(prompt(12, 4), 5, GREEDY, constraint=Constraint.of_regex("[a-z]{5}")),
    Request(prompt(12, 4), 5, GREEDY, stop=("zz",)),
  ):
    alone = [bits(answers(engine, [request])[0]) for request in (*others, special)]
    assert [bits(answer) for answer in answers(engine, [*others, special])] == alone


def test_a_row_can_be_cancelled_with_a_call_in_flight(engine):
  mine, other = Request(prompt(5), 8, GREEDY), Request(prompt(9, 3), 8, GREEDY)
  want = bits(answers(engine, [mine])[0])
  gone, number = engine.add(other), engine.add(mine)
  pieces = engine.step() + engine.step()
  engine.cancel(gone)
  while engine.busy:
    pieces += engine.step()
  tokens = [t for p in pieces if p.request == number for t in p.tokens]
  assert bits((tokens, *want[1:])) == want
  assert [p.finish for p in pieces if p.request == gone][-1] == "cancelled"


def test_tokens_are_read_first_where_the_next_call_depends_on_them(engine, monkeypatch):
  beams = Request(prompt(5), 3, GREEDY, beams=Beams(2))
  assert order(engine, monkeypatch, [beams])[0] == "br" * 3
  form = Request(prompt(5), 3, GREEDY, constraint=Constraint.of_regex("[a-z]{3}"))
  assert order(engine, monkeypatch, [form])[0] == "br" * 3


def test_the_cache_is_not_copied(engine):
  """The two programs update it in place: no copy of a pool in the compiled text."""
  run, _ = made("gpt2")
  shape = engine._carried.pools[0]["k"].entries.shape
  pool = f"f32[{','.join(map(str, shape))}]"
  with jax.set_mesh(run.mesh):
    step = engine._batch.step([])
    lowered = engine._programs.decode.lower(engine._weights, engine._carried, step)
  text = lowered.compile().as_text()
  assert pool in text
  copies = [line for line in text.splitlines() if f"= {pool}" in line and " copy(" in line]
  assert not copies
