"""The tuned lens: starts as the logit lens, and undoes a change that the next layers know of."""

import jax
import ml_collections
import numpy as np
import pytest

from jaxgpt.analysis.compression import calibration
from jaxgpt.analysis.interpret import explain, lens, taps, tuned_lens
from jaxgpt.commands.models import lens as command
from jaxgpt.errors import UserError
from jaxgpt.inference import load


@pytest.fixture(scope="module")
def small(trained):
  """(model, parameters, batches of training text, of validation text) on one device."""
  run = load.load(trained, devices=jax.local_devices()[:1])
  m = explain.of_run(run)
  texts = [calibration.rows(run, None, split, 8)[0] for split in ("train", "validation")]
  return m.model, m.params, *texts


def test_without_training_it_is_the_logit_lens(small):
  model, params, batches, _ = small
  batch = batches[0]
  inputs = taps.Inputs(batch["tokens"], batch["segment_ids"], batch["positions"])
  reading = taps.read(model, params, inputs, ("resid_pre", "resid_final"))
  found = lens.logit_lens(model, params, inputs, lens.streams(reading.at), k=model.cfg.vocab_size)
  log_p = np.asarray(jax.nn.log_softmax(reading.output.logits), np.float64)
  real = np.asarray(batch["segment_ids"]) > 0
  sums, tokens = jax.jit(
    lambda p, b: tuned_lens.divergences(model, p, tuned_lens.none(model.cfg), b)
  )(params, batch)
  assert tokens == real.sum()
  for layer in range(model.cfg.num_layers):
    ids = np.asarray(found.ids[layer])
    log_q = np.log(np.asarray(found.probabilities[layer], np.float64))
    of_ids = np.take_along_axis(log_p, ids, -1)
    kl = (np.exp(of_ids) * (of_ids - log_q)).sum(-1)[real].mean()
    assert float(sums[layer] / tokens) == pytest.approx(kl, rel=1e-3)


def test_every_token_counts_the_same_whatever_its_batch(small):
  model, params, batches, _ = small
  row = {name: x[:1] for name, x in batches[0].items()}
  short = {**row, "segment_ids": row["segment_ids"].at[:, 4:].set(0)}
  maps = tuned_lens.none(model.cfg)
  alone = [tuned_lens.compare(model, params, maps, [batch]).tuned for batch in (row, short)]
  tokens = [int((batch["segment_ids"] > 0).sum()) for batch in (row, short)]
  assert tokens[1] == 4 < tokens[0]
  both = tuned_lens.compare(model, params, maps, [row, short]).tuned
  np.testing.assert_allclose(both, np.average(alone, axis=0, weights=tokens), rtol=1e-5)


@pytest.mark.slow
def test_training_brings_it_to_the_model_on_other_text(small):
  model, params, batches, held_out = small
  losses = []
  found = tuned_lens.fit(
    model, params, batches, 30, tell=lambda step, loss: losses.append((step, loss))
  )
  assert [step for step, _ in losses] == list(range(1, 31)) and losses[-1][1] < losses[0][1] / 1.5
  scores = tuned_lens.compare(model, params, found, held_out)
  assert (scores.tuned < 0.8 * scores.logit).all()
  again = tuned_lens.fit(model, params, batches, 30)
  jax.tree.map(np.testing.assert_array_equal, found, again)


def test_the_command_prints_a_row_for_each_layer(trained, tmp_path, capsys):
  out = tmp_path / "lens.npz"
  command.run(command.LensOptions(workdir=str(trained), steps=2, rows=4, out=str(out)))
  lines = capsys.readouterr().out.splitlines()
  assert [line[:5] for line in lines if line.startswith("| ")][1:] == ["| 0 |", "| 1 |"]
  with np.load(out) as f:
    assert f["a"].shape == (2, 32, 32) and np.abs(f["b"]).max() > 0
  with pytest.raises(UserError, match="give the name of a file in a folder that exists"):
    command.run(command.LensOptions(workdir=str(trained), out=str(tmp_path / "no" / "x.npz")))


def test_a_run_on_pairs_needs_text(trained, on_pairs, corpus, tmp_path, monkeypatch):
  run = on_pairs(load.load(trained, devices=jax.local_devices()[:1]))
  monkeypatch.setattr(load, "load", lambda *_, **__: run)
  options = dict(workdir=str(trained), steps=1, rows=4, out=str(tmp_path / "lens.npz"))
  with pytest.raises(UserError, match=r"pairs \(chosen, rejected\).* of text .* --data=DIR"):
    command.run(command.LensOptions(**options))
  with pytest.raises(UserError, match="--data=.* is of kind preference, and data of kind text or"):
    command.run(command.LensOptions(**options, data=run.c.data.path))
  command.run(command.LensOptions(**options, data=str(corpus)))


def test_a_model_without_tokens_to_predict_is_refused(small):
  model, params, batches, _ = small
  pooled = model.clone(cfg=ml_collections.FrozenConfigDict(model.cfg.to_dict() | {"head": "none"}))
  with pytest.raises(UserError, match="the tuned lens is for models that predict tokens"):
    tuned_lens.fit(pooled, params, batches, 1)


def test_streams_are_translated_before_each_layer_and_not_after_the_last():
  rng = np.random.default_rng(0)
  streams_RBTD, a, b = (
    rng.normal(size=size).astype(np.float32) for size in ((3, 2, 5, 4), (2, 4, 4), (2, 4))
  )
  found = np.asarray(tuned_lens.translated(streams_RBTD, tuned_lens.Translators(a, b)))
  for layer in range(2):
    h = streams_RBTD[layer]
    np.testing.assert_allclose(found[layer], h + h @ a[layer] + b[layer], rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(found[2], streams_RBTD[2])
