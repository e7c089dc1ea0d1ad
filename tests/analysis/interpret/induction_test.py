"""Constructed truth: a model of two attention layers that learned to copy, taken apart."""

import json
import pathlib
import random
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.analysis.interpret import explain, gradients, heads, patching, probes, taps
from jaxgpt.inference import load
from jaxgpt.text.prepare import prepare
from tests.trained import train

pytestmark = pytest.mark.slow
HALF, LETTERS = 12, string.ascii_letters


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """The model of configs/induction.py after 300 steps."""
  folder = tmp_path_factory.mktemp("induction")
  rng = random.Random(0)
  with open(folder / "repeats.jsonl", "w") as f:
    for _ in range(14_000):
      once = "".join(rng.choices(LETTERS, k=rng.randint(6, 20)))
      f.write(json.dumps({"text": (once * 8)[:48]}) + "\n")
  prepare.prepare([folder / "repeats.jsonl"], folder / "data", tokenizer="bytes")
  c, _ = config.load(str(pathlib.Path(__file__).parents[3] / "configs" / "induction.py"))
  c.data.path = str(folder / "data")
  c.train.steps = c.eval.every = c.checkpoint.every = 300
  c.mesh.update(dict(data=-1, fsdp=1))
  train(c, folder / "run")
  return explain.of_run(load.load(folder / "run", devices=jax.local_devices()[:1]))


def texts(model, rows, seed=0):
  """Random letters that the model has never seen, each text twice in a row, after bos."""
  letters = np.asarray(model.tokenizer.encode(LETTERS))
  once = letters[np.asarray(heads.repeated(jax.random.key(seed), rows, HALF, len(letters)))]
  return np.concatenate([np.full((rows, 1), model.tokenizer.bos_id), once], 1)


def copied(model, tokens, edits=None):
  """Share of the second copy's tokens that the model predicts."""
  logits = taps.read(model.model, model.params, taps.Inputs(jnp.asarray(tokens)), (), edits)
  right = np.asarray(logits.output.logits)[:, :-1].argmax(-1) == tokens[:, 1:]
  return right[:, HALF + 1 :].mean()


@pytest.fixture(scope="module")
def found(model):
  """Induction heads, by their score on other texts than those that are copied."""
  scores = heads.scores(model.model, model.params, jnp.asarray(texts(model, 64, 1)[:, 1:]))
  assert scores.previous[0].max() > 0.9  # the first layer passes on the token before
  assert scores.induction[0].max() < 0.1
  return [(1, int(h)) for h in np.flatnonzero(np.asarray(scores.induction[1]) > 0.5)]


def test_without_the_induction_heads_nothing_is_copied(model, found):
  tokens = texts(model, 64)
  every = [(1, h) for h in range(4)]
  assert found
  assert copied(model, tokens) > 0.95
  assert copied(model, tokens, patching.ablate_heads(model.model.cfg, found)) < 0.1
  others = [head for head in every if head not in found]
  assert copied(model, tokens, patching.ablate_heads(model.model.cfg, others)) > 0.9


def test_a_probe_reads_the_letter_before_and_not_a_control_task(model):
  tokens = texts(model, 200, 5)
  read = taps.read(model.model, model.params, taps.Inputs(jnp.asarray(tokens)), ("resid_pre",))
  upper = np.isin(tokens, model.tokenizer.encode(string.ascii_uppercase))
  here, before = tokens[:, 2:].ravel(), tokens[:, 1:-1].ravel()
  embeddings, first = (
    probes.probe(np.asarray(x)[:, 2:].reshape(len(here), -1), upper[:, 1:-1].ravel(), types)
    for x, types in zip(read.at["resid_pre"], [here * 1000 + before] * 2)
  )
  assert embeddings.accuracy < 0.65 < 0.7 < first.accuracy
  assert first.selectivity > 0.15


@pytest.fixture(scope="module")
def pairs(model):
  """200 pairs of texts that differ in the letter that is to be copied, and where that is."""
  rng, rows = np.random.default_rng(2), np.arange(200)
  clean = texts(model, len(rows), 3)
  i = rng.integers(2, HALF - 1, len(rows))  # the letter of the second copy after which to predict
  at, where = 1 + HALF + i, 1 + i + 1
  right = clean[rows, where]
  letters = np.asarray(model.tokenizer.encode(LETTERS))
  wrong = np.asarray([rng.choice(np.setdiff1d(letters, row)) for row in clean])
  corrupted = clean.copy()
  corrupted[rows, where] = wrong
  inputs = [taps.Inputs(jnp.asarray(x)) for x in (clean, corrupted)]
  return *inputs, patching.Answer(at, right, wrong), where


def test_patching_finds_the_position_that_was_corrupted(model, pairs, found):
  clean, corrupted, answer, where = pairs
  traced = patching.trace(model.model, model.params, clean, corrupted, answer)
  assert (traced.clean > 0).mean() > 0.95 and (traced.corrupted < 0).mean() > 0.95
  for layer in range(2):
    assert (np.asarray(traced.recovered[layer]).argmax(0) == where).mean() >= 0.95
  by_head = patching.trace(model.model, model.params, clean, corrupted, answer, "heads", "head")
  share = np.asarray(by_head.recovered[1]).mean(-1)  # of the heads that write the answer
  best = {(1, int(h)) for h in np.flatnonzero(share > 0.15)}
  assert best and best <= set(found)


def test_integrated_gradients_point_at_the_place_that_is_copied(model, pairs):
  clean, _, answer, where = jax.tree.map(lambda x: x[:32], pairs)
  blank = jnp.where(clean.tokens == model.tokenizer.bos_id, clean.tokens, model.tokenizer.eos_id)
  baseline = clean._replace(tokens=blank)
  shares = gradients.integrated(model.model, model.params, clean, baseline, answer)
  assert shares.error <= 1e-3
  # In the first copy: the letter that is looked for, or the letter after it, which is copied.
  most = np.asarray(shares.tokens)[:, 1 : HALF + 1].argmax(-1) + 1
  assert np.isin(most - where, (-1, 0)).mean() > 0.9
