"""Pruned runs: made from a trained one, evaluated, trained on and exported."""

import jax
import numpy as np
import pytest

from jaxgpt.analysis import reproduce, run_table
from jaxgpt.analysis.compression import calibration, compressed_run, masks, matrices, methods, prune
from jaxgpt.commands.models import prune as command
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.model import transformer
from jaxgpt.run import run_folder
from jaxgpt.run.compression import record
from tests.trained import train

HALF = masks.parse("0.5")
TEXT = compressed_run.Calibration(rows=16)


@pytest.fixture(scope="module")
def wanda(trained, tmp_path_factory):
  folder = tmp_path_factory.mktemp("wanda") / "run"
  zeros = compressed_run.pruned(trained, folder, prune.Settings("wanda", masks.parse("2:4")), TEXT)
  return folder, zeros


def weights_of(run):
  return calibration.flat(run.params)


def test_the_inputs_of_matrices_are_those_of_the_model(opened, text):
  """The squares that Wanda sees are those of a forward pass of the whole model."""
  seen = []
  same = calibration.walk(opened, text, lambda s: seen.append(s) or s.params)
  assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (same, opened.params))))
  assert [(s.stack, s.repeat) for s in seen] == [("layers", 0), ("layers", 1)]
  names = {f"attn/{x}" for x in "qkvo"} | {f"mlp/{x}" for x in ("gate", "up", "down")}
  assert all(set(s.inputs) == names for s in seen)
  # The last layer's output, and the normed input of its first matrices, from the model itself.
  total, scale = 0.0, weights_of(opened)["layers/attn_norm/scale"][1]
  for batch in text:
    with jax.set_mesh(opened.mesh):
      out = opened.parts.model.apply(
        {"params": opened.params},
        *(batch[k] for k in ("tokens", "positions", "segment_ids")),
        layer_outputs=True,
      )
    x = np.asarray(out.layers[0], "float64")  # before the second layer
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + opened.c.model.norm_eps) * scale
    total += (x**2 * (np.asarray(batch["segment_ids"]) > 0)[..., None]).sum((0, 1))
  np.testing.assert_allclose(seen[1].inputs["attn/q"], total, rtol=1e-4)
  assert 0 < seen[0].similarity < 1


def test_products_of_one_batch_are_on_the_device_at_a_time(opened, corpus, monkeypatch):
  batches = calibration.rows(opened, str(corpus), "train", 40)[0]
  counts, make = [], calibration._period_step

  def held():
    counts.append(sum(x.shape == (64, 64) for x in jax.live_arrays()))

  def counting(*args):
    step = make(*args)
    return lambda *args: (held(), step(*args))[1]

  monkeypatch.setattr(calibration, "_period_step", counting)
  held()
  seen = []
  calibration.walk(opened, batches, lambda s: (held(), seen.append(s), s.params)[2], products=True)
  assert len(batches) == 5 and max(counts) <= counts[0] + 1
  of = seen[0].inputs
  assert of["mlp/down"].shape == (64, 64)  # the only one of this size
  assert of["attn/q"] is of["attn/k"] is of["attn/v"] and of["mlp/gate"] is of["mlp/up"]


@pytest.mark.parametrize("scope", methods.SCOPES["magnitude"])
def test_magnitude_removes_the_smallest_of_a_matrix_or_of_all(opened, scope):
  found = prune.prune(opened, prune.Settings("magnitude", HALF, scope))
  before, after = weights_of(opened), calibration.flat(found.params)
  _, axes = transformer.abstract(opened.parts.model)
  paths = list(matrices.of(axes, opened.params))
  assert len(paths) == 7 and compressed_run.share(found.zeros) == pytest.approx(0.5, abs=1e-3)
  sizes = np.concatenate([np.abs(before[p]).ravel() for p in paths])
  limit = np.sort(sizes)[round(sizes.size / 2)]
  for path in before:
    kept = after[path] != 0
    np.testing.assert_array_equal(after[path][kept], before[path][kept])
    if path not in paths:
      assert kept.all() or "norm" in path
    elif scope == "global":
      np.testing.assert_array_equal(kept, np.abs(before[path]) >= limit)
    else:
      assert ((~kept).reshape(2, -1).mean(1) == 0.5).all()


def test_wanda_keeps_the_best_of_every_group(trained, opened, text, wanda):
  folder, zeros = wanda
  run = load.load(folder)
  assert compressed_run.share(zeros) == 0.5 and run.step == 8
  before, after = weights_of(opened), weights_of(run)
  reads = []
  calibration.walk(opened, text, lambda s: reads.append(s.inputs) or s.params)
  # The first layer reads the same with and without pruning, so its scores are known.
  for path, size in (("attn/q", 32), ("attn/o", 32), ("mlp/down", 64)):
    weight_IO = before[f"layers/{path}"][0].reshape(size, -1)
    kept_IO = after[f"layers/{path}"][0].reshape(size, -1) != 0
    scores_IO = np.abs(weight_IO) * np.sqrt(reads[0][path])[:, None]
    if path == "attn/q":  # others read the outputs of matrices that are pruned with them
      expected = np.argsort(np.argsort(scores_IO.reshape(-1, 4, kept_IO.shape[1]), 1), 1) >= 2
      np.testing.assert_array_equal(kept_IO, expected.reshape(kept_IO.shape))
    assert (kept_IO.reshape(-1, 4, kept_IO.shape[1]).sum(1) == 2).all()
  made = record.read(folder)
  assert made["made_by"] == "jaxgpt prune" and made["source"] == str(trained)
  assert made["calibration"]["rows"] == 16 and made["sparsity"] == "2:4"
  assert load.evaluate_run(run)["loss"] > 0


@pytest.mark.parametrize("scope", methods.SCOPES["wanda"])
def test_wanda_compares_within_an_output_or_a_matrix(opened, text, scope):
  found = prune.prune(opened, prune.Settings("wanda", HALF, scope), text)
  before, after = weights_of(opened), calibration.flat(found.params)
  reads = []
  calibration.walk(opened, text, lambda s: reads.append(s.inputs) or s.params)
  weight_IO = before["layers/attn/q"][0].reshape(32, -1)
  kept_IO = after["layers/attn/q"][0].reshape(32, -1) != 0
  scores_IO = np.abs(weight_IO) * np.sqrt(reads[0]["attn/q"])[:, None]
  limit = np.median(scores_IO, axis=0 if scope == "output" else None)
  np.testing.assert_array_equal(kept_IO, scores_IO > limit)


@pytest.mark.slow
def test_zeros_stay_zero_in_training_and_resume_exactly(wanda, tiny, tmp_path):
  folder, zeros = wanda
  c = tiny(init_from=str(folder), optim__keep_zeros=True, train__steps=4)
  c.optim.prune.update(dict(sparsity=0.75, start=1, end=3, every=1))
  out = train(c, tmp_path / "whole")
  assert f"keeps {sum(n for n, _ in zeros.values()):,} of" in out
  train(c, tmp_path / "parts", until=2)
  train(c, tmp_path / "parts")
  whole, parts = (weights_of(load.load(tmp_path / name)) for name in ("whole", "parts"))
  before = weights_of(load.load(folder))
  changed = 0
  for path, x in whole.items():
    np.testing.assert_array_equal(x, parts[path])
    if path in zeros:
      assert not x[before[path] == 0].any()
      assert (x == 0).reshape(2, -1).mean(1) == pytest.approx(0.75, abs=2e-3)  # of each layer
      changed += (x[x != 0] != before[path][x != 0]).sum()
  assert changed > 1000


def test_zeros_are_exported(wanda, tmp_path):
  st = pytest.importorskip("safetensors.numpy")
  from jaxgpt.commands.actions import import_export

  import_export.export_run(wanda[0], tmp_path / "hf", certify=False)
  tensors = st.load_file(tmp_path / "hf" / "model.safetensors")
  zeros = sum(int((x == 0).sum()) for x in tensors.values())
  assert zeros == sum(n for n, _ in wanda[1].values())
  import_export.import_model(tmp_path / "hf", tmp_path / "back", tokenizer=wanda[0] / "tokenizer")
  back, own = weights_of(load.load(tmp_path / "back")), weights_of(load.load(wanda[0]))
  assert all(np.array_equal(own[path], back[path]) for path in own)


def test_a_compressed_run_is_no_training_run(trained, wanda, tiny, tmp_path):
  folder, _ = wanda
  assert [row.status for row in run_table.table(folder.parent)] == ["compressed"]
  c = run_folder.read_config(folder)
  with pytest.raises(UserError, match="was made by jaxgpt prune from .* no state to go on from"):
    train(c, folder)
  with pytest.raises(UserError, match="it has no training steps to reproduce"):
    reproduce.settings(folder)
  with pytest.raises(UserError, match="optim.keep_zeros=True has no effect: init_from"):
    train(tiny(init_from=str(trained), optim__keep_zeros=True), tmp_path / "dense")
  with pytest.raises(UserError, match="optim.keep_zeros"):
    train(tiny(optim__keep_zeros=True), tmp_path / "new")


def test_calibration_needs_text(trained, opened, on_pairs, corpus):
  calibrated = compressed_run.calibrated
  run = on_pairs(load.load(trained))
  with pytest.raises(UserError, match="objective.name='preference': .* --data=DIR"):
    calibrated(run, TEXT)  # the objectives without a reference stay
  assert calibrated(run, TEXT._replace(data=str(corpus)))[0][0]["tokens"].shape == (8, 32)
  c = opened.c.copy_and_resolve_references()
  c.data.path = run.c.data.path  # a run that had a reference
  with pytest.raises(UserError, match="the run's data .* is of kind preference.* --data=DIR"):
    calibrated(opened._replace(c=c), TEXT)
  batches, record_of = calibrated(opened._replace(c=c), TEXT._replace(data=str(corpus)))
  assert record_of["data"] == str(corpus) and sum(len(b["tokens"]) for b in batches) == 16


def test_what_cannot_be_pruned_is_refused(trained, opened, wanda, tmp_path):
  settings = lambda *args, **more: prune.prune(opened, prune.Settings(*args, **more))
  with pytest.raises(UserError, match="--match=layers/atn/q: matches no parameter; did you mean"):
    settings("magnitude", HALF, match=("layers/atn/q",))
  with pytest.raises(UserError, match="embed is no matrix of a layer"):
    settings("wanda", HALF, match=("embed",))
  with pytest.raises(UserError, match="--scope=global has no effect with --sparsity=2:4"):
    settings("magnitude", masks.parse("2:4"), "global")
  with pytest.raises(UserError, match="--method=wanda has no --scope=global; choose output or lay"):
    settings("wanda", HALF, "global")
  with pytest.raises(UserError, match="--method=sparsegpt has no --scope=layer; leave it out"):
    settings("sparsegpt", HALF, "layer")
  with pytest.raises(UserError, match="--to=.* exists"):
    compressed_run.pruned(trained, wanda[0], prune.Settings("magnitude", HALF))
  with pytest.raises(UserError, match="--rows has no effect with --method=magnitude"):
    command.PruneOptions(workdir="a", to="b", method="magnitude", sparsity="0.5", rows=3)
  pruned = settings("magnitude", HALF, match=("embed",))
  assert list(pruned.zeros) == ["embed"] and compressed_run.share(pruned.zeros) == 0.5
