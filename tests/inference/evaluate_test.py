"""Evaluation of a run: the loop's numbers, a definition for strides, files, and processes."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.commands import main
from jaxgpt.errors import UserError
from jaxgpt.inference import evaluate, load, scoring
from jaxgpt.parallel import mesh
from jaxgpt.training import evaluation, loop
from tests.parallel import distributed_test


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
  """(folder, the loaded run) of a run of 4 steps that keeps an average."""
  folder = tmp_path_factory.mktemp("evaluate") / "run"
  c = tiny(train__steps=4, optim__ema=0.5, schedule__warmup_steps=1)
  loop.train(c, folder, config.flatten(c))
  return folder, load.load(folder)


def of(run, stride=None, limit=0, **source):
  folder, loaded = run
  with evaluate.opened(loaded, folder, evaluate.Source(**source)) as data:
    result, found = evaluate.evaluate(loaded, data, limit, stride)
    return result, found, found.tables()


@pytest.mark.parametrize("limit", [0, 1])
def test_scores_add_up_to_what_the_loop_reports(run, limit):
  result, _, tables = of(run, limit=limit)
  want = load.evaluate_run(run[1], limit=limit)
  assert result["tokens"] == want["tokens"] and result["data_digest"] == want["data_digest"]
  for name in ("loss", "perplexity", "bits_per_byte"):
    assert result[name] == pytest.approx(want[name], rel=1e-5)
  for rows in tables.values():
    assert sum(row["predictions"] for row in rows) == want["tokens"]


def test_a_stride_equals_its_definition(run):
  """Each prediction by a forward pass of its own over the window that the definition names."""
  _, loaded = run
  model, seq_len, stride = loaded.parts.model, 32, 8
  result, found, _ = of(run, stride=stride)
  _, batches = load.open_split(loaded)
  split = batches.sources[0].split

  @jax.jit
  def log_probs(tokens_BT):
    positions = jnp.broadcast_to(jnp.arange(seq_len), tokens_BT.shape)
    return jax.nn.log_softmax(model.apply({"params": loaded.params}, tokens_BT, positions).logits)

  total = count = 0
  for doc in range(4):  # of the split's documents; all of them take long
    n = int(split.lengths[doc])
    ids = split.read(doc, 0, n + 1)
    ends = [min(seq_len, n)]
    while ends[-1] < n:
      ends.append(min(ends[-1] + stride, n))
    rows = np.zeros((len(ends), seq_len), np.int32)
    for row, end in zip(rows, ends):
      start = max(end - seq_len, 0)
      row[: end - start] = ids[start:end]
    table = np.asarray(log_probs(rows))
    for i, (before, end) in enumerate(zip([0, *ends], ends)):
      start = max(end - seq_len, 0)
      for p in range(before, end):
        total -= table[i, p - start, ids[p + 1]]
        count += 1
  scored = found.examples()
  assert count == scored.weight[:4].sum()
  assert scored.nll[:4].sum() == pytest.approx(total, rel=1e-5)
  assert result["tokens"] == int(split.lengths.sum())
  assert result["loss"] != pytest.approx(of(run)[0]["loss"], rel=1e-6)


def test_chunks_of_the_logits_change_nothing(run):
  folder, loaded = run
  c = loaded.c.copy_and_resolve_references()
  c.objective.loss_chunk = 7
  whole, _, _ = of(run, limit=1)
  chunked, _, _ = of((folder, loaded._replace(c=c)), limit=1)
  assert chunked["loss"] == pytest.approx(whole["loss"], rel=1e-6)
  assert chunked["accuracy"] == whole["accuracy"]


def test_a_chunk_is_that_of_a_device_and_never_longer_than_a_row(run, monkeypatch):
  _, loaded = run
  _, batches = load.open_split(loaded)
  batch = next(iter(evaluation.held_out_batches(batches, loaded.mesh, loaded.c.data)))
  B, T = batch["tokens"].shape
  rows, lengths, real = -(-B // mesh.num_batch_shards(loaded.mesh.shape)), [], scoring._by_chunk

  def by_chunk(*args):
    lengths.append(args[-1])
    return real(*args)

  monkeypatch.setattr(scoring, "_by_chunk", by_chunk)
  for chunk in (1, 3 * rows, T * rows, 100 * T * rows):
    step = scoring.make_step(loaded.parts.model, loaded.mesh, chunk)
    with jax.set_mesh(loaded.mesh):
      assert jax.eval_shape(step, loaded.params, batch).nll.shape == (B, T)
  assert lengths == [1, 3]


def test_files_that_are_left_out_are_counted(run, tmp_path, capsys):
  folder, _ = run
  there = tmp_path / "there"
  there.mkdir()
  (there / "a.jsonl").write_text('{"text": "the cat sat"}\n{"txt": "no"}\n{"text": "a mat"}\n')
  (there / "b.pdf").write_text("")
  words = [f"--data={there}", f"--workdir={folder}"]
  assert main.main(["evaluate", *words, "--json"]) == 0
  found = json.loads(capsys.readouterr().out)["left_out"]
  assert found == {"documents": {"missing field": 1}, "files": {"suffix .pdf": 1}}
  said = ["1 of 3 documents are left out: missing field", "1 passed over: suffix .pdf, such as"]
  assert main.main(["evaluate", *words]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert all(words in line for words, line in zip(said, lines))
  assert main.main(["compare", str(folder), str(folder), words[0], "--resamples=100"]) == 0
  assert capsys.readouterr().out.splitlines()[:2] == lines[:2]


def test_files_are_tokenized_with_the_tokenizer_of_the_run(run, tmp_path):
  texts = ["the cat sat on a mat", "two dogs saw\nthe cat", "x"]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
  result, found, tables = of(run, data=str(tmp_path / "a.jsonl"))
  num_bytes = sum(map(len, texts))
  assert result["tokens"] == num_bytes + 3  # bytes, and the end of each
  assert result["bits_per_byte"] == pytest.approx(
    result["loss"] * result["tokens"] / math.log(2) / num_bytes
  )
  assert tables["source"][0]["documents"] == 3
  (tmp_path / "b.txt").write_text(texts[1])
  alone, _, _ = of(run, data=str(tmp_path / "b.txt"))
  assert alone["loss"] == pytest.approx(found.examples().nll[1] / 21, rel=1e-5)


def test_what_has_no_effect_is_refused(run, tmp_path):
  (tmp_path / "b.txt").write_text("a")
  for source, said in (
    (dict(data=str(tmp_path / "b.txt"), split="test"), "--split=test: .* has no splits"),
    (dict(kind="text"), "--kind is for files"),
    (dict(data=str(tmp_path / "b.txt"), kind="preference"), "--kind=preference: .* text or"),
    (dict(data=str(tmp_path / "none.txt")), "none.txt"),
  ):
    with pytest.raises(UserError, match=said):
      of(run, **source)
  with pytest.raises(UserError, match="--stride=33 must be from 1 to"):
    of(run, stride=33)


def test_raw_and_averaged_weights(run, tiny, tmp_path):
  folder, averaged = run
  raw = load.load(folder, weights="raw")
  leaf = lambda r: np.asarray(jax.tree.leaves(r.params)[0])
  assert not np.allclose(leaf(raw), leaf(averaged), atol=1e-6)
  np.testing.assert_array_equal(leaf(load.load(folder, weights="ema")), leaf(averaged))


def test_the_gap_is_that_to_the_training_split_in_the_same_way(run, capsys):
  folder, _ = run
  words = ["evaluate", f"--workdir={folder}", "--gap", "--batches=1", "--json"]
  for more, options in (([], {}), (["--stride=20"], dict(stride=20))):
    assert main.main([*words, *more]) == 0
    got = json.loads(capsys.readouterr().out)
    train, _, _ = of(run, limit=1, split="train", **options)
    assert got["train_loss"] == pytest.approx(train["loss"])
    assert got["gap"] == pytest.approx(got["loss"] - train["loss"])
  assert main.main([*words, "--split=train"]) == 2
  assert "--gap compares with the training split" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_report_what_one_does(run, capsys):
  folder, _ = run
  words = ["evaluate", f"--workdir={folder}", "--stride=20", "--json", "--gap"]
  assert main.main(words) == 0
  want = json.loads(capsys.readouterr().out)
  done = distributed_test.finish(distributed_test.start(None, "", 2, devices=2, command=words))
  assert [code for code, _, _ in done] == [0, 0]
  outs = [text[text.find("{") :] if "{" in text else "" for _, text, _ in done]
  got = json.loads(outs[0])
  assert outs[1] == ""
  assert got["tokens"] == want["tokens"] and got["by"].keys() == want["by"].keys()
  for name in ("loss", "accuracy", "bits_per_byte", "train_loss"):
    assert got[name] == pytest.approx(want[name], rel=1e-5)
  assert got["gap"] == pytest.approx(want["gap"], abs=1e-4) and want["gap"]
