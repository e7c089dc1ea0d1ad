"""Sparse autoencoders: they find a known dictionary, and features name the documents of a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.analysis.interpret import explain, features, sparse_autoencoder
from jaxgpt.commands.models import features as command
from jaxgpt.errors import UserError
from jaxgpt.inference import load

PLACE = features.Place("resid_post", 0)


def dictionary(rng, features=24, dims=16, active=2, rows=8_000):
  """(activations that are sums of few known directions, these directions)."""
  directions = rng.normal(size=(features, dims))
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  chosen = np.argsort(rng.random((rows, features)), axis=1)[:, :active]
  z = np.zeros((rows, features))
  np.put_along_axis(z, chosen, rng.uniform(0.5, 1.5, (rows, active)), 1)
  return (5 * (z @ directions) + 2).astype(np.float32), directions


def test_it_finds_the_directions_that_activations_are_made_of():
  x, directions = dictionary(np.random.default_rng(0))
  losses = []
  how = sparse_autoencoder.Training(32, 2, 800, batch=256, lr=5e-3)
  found = sparse_autoencoder.fit(x, how, lambda step, loss: losses.append(loss))
  cosine = directions @ np.asarray(found.decoder).T
  assert (cosine.max(1) > 0.95).mean() > 0.95
  z = np.asarray(sparse_autoencoder.encode(found, x))
  assert (z > 0).sum(1).max() <= 2
  again = np.asarray(sparse_autoencoder.decode(found, jnp.asarray(z)))
  assert 1 - np.square(x - again).sum() / np.square(x - x.mean(0)).sum() > 0.9
  assert losses[-1] < 0.1 < losses[0]
  np.testing.assert_allclose(np.linalg.norm(found.decoder, axis=1), 1, rtol=1e-5)


def test_the_encoding_by_definition():
  rng = np.random.default_rng(1)
  x, encoder, decoder, bias = (
    rng.normal(size=s).astype(np.float32) for s in ((7, 4), (4, 6), (6, 4), 4)
  )
  found = sparse_autoencoder.Autoencoder(encoder, decoder, bias, 2)
  raw = (x - bias) @ encoder
  want = np.zeros_like(raw)
  for i, row in enumerate(raw):
    for f in np.argsort(-row)[:2]:
      want[i, f] = max(row[f], 0)
  np.testing.assert_allclose(sparse_autoencoder.encode(found, x), want, rtol=1e-5)
  np.testing.assert_allclose(
    sparse_autoencoder.decode(found, want), want @ decoder + bias, rtol=1e-5
  )


def test_it_refuses_more_features_at_a_token_than_there_are():
  with pytest.raises(UserError, match="--k=5: choose 1 to 4"):
    sparse_autoencoder.fit(np.eye(3, dtype=np.float32), sparse_autoencoder.Training(4, 5, 1))
  with pytest.raises(UserError, match="are all the same"):
    sparse_autoencoder.fit(np.ones((3, 3), np.float32), sparse_autoencoder.Training(4, 2, 1))


@pytest.fixture(scope="module")
def small(trained):
  """(model, data, batches of training text) on one device."""
  run = load.load(trained, devices=jax.local_devices()[:1])
  _, data = load.open_split(run, "train")
  return explain.of_run(run), data, list(features.rows(data, 16))


def exact(size):
  """An autoencoder that loses nothing: a feature for each direction and its opposite."""
  eye = np.eye(size, dtype=np.float32)
  both = jnp.asarray(np.concatenate([eye, -eye]))
  return sparse_autoencoder.Autoencoder(both.T, both, jnp.zeros(size), size)


def test_a_reconstruction_without_loss_recovers_everything_and_zeros_nothing(small):
  m, _, batches = small
  found = features.measure(m, exact(32), batches, PLACE)
  assert found.explained == pytest.approx(1, abs=1e-6)
  assert found.replaced == pytest.approx(found.loss, rel=1e-6) and found.zero > found.loss + 0.1
  assert found.recovered == pytest.approx(1, abs=1e-4)
  x = features.activations(m, batches, PLACE)
  assert found.tokens == len(x)
  np.testing.assert_allclose(found.density[:32], (x > 0).mean(0), atol=1e-3)
  zeros = exact(32)._replace(decoder=jnp.zeros((64, 32)))
  nothing = features.measure(m, zeros, batches, PLACE)
  assert nothing.recovered == pytest.approx(0, abs=1e-6) and nothing.explained < 0.1


def test_examples_are_the_largest_activations_of_documents_that_hold_the_token(small):
  m, data, batches = small
  found = features.examples(m, exact(32), batches, PLACE, 3)
  x = features.activations(m, batches, PLACE)
  tokens = np.concatenate(
    [b.batch["tokens"][(b.batch["segment_ids"] > 0) & (b.batch["positions"] > 0)] for b in batches]
  )
  for f in range(32):
    if not found[f]:
      assert x[:, f].max() <= 0
      continue
    assert found[f][0].activation == pytest.approx(x[:, f].max(), rel=1e-5)
    values = [e.activation for e in found[f]]
    assert values == sorted(values, reverse=True)
    for e in found[f]:
      at = np.abs(x[:, f] - e.activation).argmin()
      split = data.sources[e.source].split
      before, here, _ = features.passage(split, e, 4, 4)
      assert here[0] == split.read(e.doc, e.token, 1)[0] == tokens[at]
      assert before[-1] == split.read(e.doc, e.token - 1, 1)[0]
      assert len({(e.doc, e.token) for e in found[f]}) == len(found[f])


def test_a_run_on_pairs_needs_text(trained, on_pairs, monkeypatch):
  run = on_pairs(load.load(trained, devices=jax.local_devices()[:1]))
  monkeypatch.setattr(load, "load", lambda *_, **__: run)
  with pytest.raises(UserError, match="objective.name='preference': .* --data=DIR"):
    command.run(command.FeaturesOptions(workdir=str(trained), rows=8, steps=1))


@pytest.mark.slow
def test_the_command_prints_the_reconstruction_and_writes_every_feature(trained, tmp_path, capsys):
  options = dict(workdir=str(trained), layer=0, features=64, k=8, rows=16, steps=60, top=2, show=2)
  command.run(command.FeaturesOptions(**options, out=str(tmp_path / "sae")))
  out = capsys.readouterr().out
  explained = float(out.split("variance explained")[1].split("%")[0])
  assert 30 < explained <= 100 and "dead features" in out and out.count("\nfeature ") == 2
  assert ".txt" in out and "⟦" in out
  records = [json.loads(line) for line in (tmp_path / "sae" / "features.jsonl").open()]
  assert [r["feature"] for r in records] == list(range(64))
  assert max(len(r["examples"]) for r in records) == 2
  with np.load(tmp_path / "sae" / "autoencoder.npz") as f:
    assert f["encoder"].shape == (32, 64) and f["k"] == 8
  with pytest.raises(UserError, match="--layer=5: resid_post is in layers 0, 1"):
    command.run(command.FeaturesOptions(**options | {"layer": 5}))
