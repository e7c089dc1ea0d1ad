"""Predictions of tiny models: those of a direct call of the model, for every kind of run."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgpt
from jaxgpt import config
from jaxgpt.commands.main import main
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.sampler import Sampler
from jaxgpt.model import transformer
from jaxgpt.run import generation, run_folder
from jaxgpt.tasks import api, in_training
from jaxgpt.tasks.metrics import entities
from jaxgpt.tasks.predict import job, registry, rows
from jaxgpt.tasks.predict.protocol import Settings
from jaxgpt.text.prepare import prepare
from jaxgpt.text.tokenizers.base import ByteTokenizer
from jaxgpt.training import loop
from tests import terminal

WORDS = ["the", "cat", "sat", "on", "a", "mat", "München", "and", "saw"]
TEXTS = [" ".join(WORDS[(i * j) % 9] for j in range(1 + i % 5)) for i in range(1, 40)]


def encoder(**model):
  c = config.base()
  c.model.update(
    dict(
      num_layers=1,
      width=32,
      num_heads=2,
      norm="rmsnorm",
      position="rotary",
      causal=False,
      bias=False,
    )
    | dict(init_std=0.3)
    | model
  )
  c.data.update(dict(seq_len=48, batch_size=8))
  c.mesh.data, c.mesh.fsdp = -1, 1
  return c


def run_of(c):
  """A run of random weights, without a folder."""
  tokenizer = ByteTokenizer()
  c = config.resolve(c, tokenizer.vocab_size)
  mesh, parts = load.place(c)
  params = jax.jit(lambda: transformer.init(parts.model, jax.random.key(0)))()
  params = jax.device_put(params, jax.tree.map(lambda s: s.sharding, parts.state["params"]))
  ends = generation.Generation({"eos_token_id": [tokenizer.eos_id]})
  return load.Run(c, parts, mesh, params, 0, tokenizer, "", ends)


def predict(run, values, rows_of_a_batch=4, **options):
  made = registry.make(run, settings=Settings(rows=rows_of_a_batch, **options))
  return job.predict_rows(made, run.params, rows.of_values(values, made.kind))


def direct(run, ids, **options):
  """The model's output for one text, without padding or a batch."""
  tokens = jnp.array([ids])
  apply = jax.jit(functools.partial(run.parts.model.apply, **options))
  with jax.set_mesh(run.mesh):
    out = apply({"params": run.params}, tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens))
  return np.asarray(out.logits)[0]


def ids_of(run, text):
  t = run.tokenizer
  return [t.bos_id, *t.encode(text), t.eos_id]


def test_classes_have_the_models_probabilities_whatever_the_batch():
  c = encoder(head="classifier", pooling="mean", num_labels=3, label_names=("a", "b", "c"))
  c.objective.name = "classification"
  run, shares = run_of(c), []
  found = predict(run, TEXTS, tell=shares.append)
  assert len(shares) > 1 and shares == sorted(shares) and shares[-1] == 1
  for text, got in list(zip(TEXTS, found, strict=True))[::13]:
    want = np.exp(direct(run, ids_of(run, text)))
    assert list(got["probabilities"].values()) == pytest.approx(want / want.sum(), abs=2e-6)
    assert got["label"] == "abc"[want.argmax()]
  assert len({got["label"] for got in found}) > 1
  pair = predict(run, [{"text": "x", "text_pair": "y z"}, "x"])
  assert pair[0] != pair[1]


def test_experts_drop_no_token_of_a_row_whatever_it_is_padded_to():
  c = encoder(head="classifier", pooling="mean", num_labels=3, mlp_pattern=("moe",))
  c.model.moe.update(dict(experts=4, width=16, capacity=0.5))
  c.objective.name = "classification"
  run = run_of(c)
  (alone,), (got, _) = predict(run, ["a cat"]), predict(run, ["a cat", "a mat and a cat " * 2])
  assert list(got["probabilities"].values()) == pytest.approx(
    list(alone["probabilities"].values()), abs=2e-6
  )


def test_a_regression_and_sets_of_labels():
  c = encoder(head="classifier", pooling="mean", num_labels=1)
  c.objective.name = "classification"
  run = run_of(c)
  (got,) = predict(run, ["a cat"])
  assert got["value"] == pytest.approx(direct(run, ids_of(run, "a cat"))[0], abs=2e-6)
  c = encoder(head="classifier", pooling="mean", num_labels=3, label_names=("a", "b", "c"))
  c.objective.name = "multi_label"
  run = run_of(c)
  (got,) = predict(run, ["a cat"])
  want = 1 / (1 + np.exp(-direct(run, ids_of(run, "a cat"))))
  assert list(got["probabilities"].values()) == pytest.approx(want, abs=2e-6)
  assert got["labels"] == [n for n, p in zip("abc", want, strict=True) if p > 0.5]


def test_tags_are_those_of_the_first_token_of_each_word():
  names = ("O", "B-X", "I-X")
  c = encoder(head="token_classifier", num_labels=3, label_names=names)
  c.objective.name = "token_classification"
  run = run_of(c)
  words = ["München", "saw", "a", "cat"]
  long = {"words": [*words] * 5}  # continues in further rows
  got, of_long = predict(run, [{"words": words}, long])
  logits = direct(run, ids_of(run, " ".join(words)))
  firsts = [1, 10, 14, 16]  # bytes, after bos
  assert got["tags"] == [names[logits[at].argmax()] for at in firsts]
  assert [(e["type"], e["start"], e["end"]) for e in got["entities"]] == [
    tuple(e) for e in entities.entities(got["tags"])
  ]
  assert len(of_long["tags"]) == 20


def test_answers_are_the_best_spans_over_windows():
  c = encoder(head="token_classifier", num_labels=2, head_bias=True)
  c.objective.name = "question_answering"
  c.data.overlap = 8
  run = run_of(c)
  context = "Ann met Bob in München. " * 4  # several windows
  row = {"question": "Who met?", "context": context}
  short = {"question": "Who?", "context": "Ann met Bob."}
  found = predict(run, [row, short, {**row, "answers": []}])
  assert found[0] == found[2]  # an answer in the row changes nothing
  for got, given in zip(found, (row, short), strict=False):
    if got["answer"]:
      assert given["context"][got["start"] : got["end"]] == got["answer"]
  t = run.tokenizer
  before = [t.bos_id, *t.encode("Who?"), t.eos_id]
  x = direct(
    run,
    [*before, *t.encode("Ann met Bob."), t.eos_id],
    token_types_BT=jnp.array([[0] * len(before) + [1] * 13]),
  )
  n = len(before)
  score, start, end = max(
    (x[i, 0] + x[j, 1], i, j) for i in range(n, n + 12) for j in range(i, n + 12)
  )
  want = "Ann met Bob."[start - n : end + 1 - n] if score >= x[0].sum() else ""
  assert found[1]["answer"] == want


def test_embeddings_of_queries_and_passages():
  c = encoder(head="none", pooling="mean")
  c.objective.name = "contrastive"
  run = run_of(c)
  found = predict(run, ["a cat", {"query": "a cat", "positive": "the mat"}, {"text": "the mat"}])
  want = direct(run, ids_of(run, "a cat")).mean(0)
  assert found[0]["embedding"] == pytest.approx(want / np.linalg.norm(want), abs=2e-6)
  assert found[1]["embedding"] == found[0]["embedding"] and "positive_embedding" not in found[0]
  assert found[1]["positive_embedding"] == found[2]["embedding"]


def test_texts_of_prompts_in_a_batch_are_those_of_each_alone():
  c = encoder(causal=True, head="lm")
  run, shares = run_of(c), []
  found = predict(run, [*TEXTS[:9], "x" * 60], max_new=6, tell=shares.append)
  assert shares == pytest.approx([i / 9 for i in range(1, 10)])
  sampler = Sampler(run)
  greedy = load.Sampling(temperature=0.0)
  for text, got in list(zip(TEXTS, found[:9], strict=False))[::3]:
    assert [got["text"]] == sampler(text, 6, greedy)
  assert (
    "61 tokens, the model's context 48" in found[9]["error"] or "60 tokens" in found[9]["error"]
  )
  drawn = [
    predict(run, TEXTS[:5], max_new=9, sampling=load.Sampling(2.0), seed=s) for s in (1, 1, 2)
  ]
  assert drawn[0] == drawn[1] != drawn[2]


def test_other_draws_need_no_further_predictor():
  run = run_of(encoder(causal=True, head="lm"))
  model = api.Model(run)
  options = [
    dict(seed=s, temperature=t, max_new=n) for s, t, n in ((1, 2, 5), (2, 2, 5), (0, 0, 3))
  ]
  found = [model.predict(TEXTS[:2], batch_size=4, **one) for one in options]
  assert len(model._predictors) == 1 and found[0] != found[1]
  for one, got in zip(options, found, strict=True):
    draws = load.Sampling(temperature=one.pop("temperature"))
    assert got == predict(run, TEXTS[:2], sampling=draws, **one)
  with pytest.raises(UserError, match="temperature"):
    model.predict(TEXTS[:2], batch_size=4, temperature=-1.0)


@pytest.mark.parametrize(
  "model, objective, match",
  [(dict(head="lm"), "masked_lm", "predicts nothing for a row")],
)
def test_a_model_that_predicts_nothing_is_refused(model, objective, match):
  c = encoder(**model)
  c.objective.name = objective
  with pytest.raises(UserError, match=match):
    registry.make(run_of(c))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(run folder, file of labelled rows, some malformed) of a classifier after a few steps."""
  folder = tmp_path_factory.mktemp("trained")
  data = [{"text": text, "label": "long" if len(text) > 12 else "short"} for text in TEXTS * 3]
  path = folder / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in data))
  prepare.prepare(
    [path], folder / "data", tokenizer="bytes", kind="classification", validation=0.2, cut_chars=0
  )
  c = encoder(head="classifier", pooling="mean", num_labels=2)
  c.objective.name = "classification"
  c.data.path = str(folder / "data")
  c.train.steps = 4
  c.schedule.warmup_steps = 1
  c.eval.every = 2
  c.checkpoint.best = "task/accuracy"
  other = folder / "reviews.data"  # another name for the column, and a suffix that says nothing
  other.write_text(path.read_text().replace('"text"', '"review"'))
  c.task.name, c.task.data, c.task.rows = "sentiment", str(other), 30
  c.task.fields, c.task.format = ("text=review",), "jsonl"
  loop.train(c, folder / "run", {}, evaluator_makers=in_training.EVALUATORS)
  with path.open("a") as f:
    f.write('{"label": "long"}\n{"text": "the cat", "label": "short"}\n')
  return folder / "run", path


def test_a_runs_evaluations_have_the_metrics_of_its_task(trained):
  run, path = trained
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  found = [line for line in lines if line["kind"] == "validation"]
  assert [line["step"] for line in found] == [2, 4]
  assert {"loss", "accuracy", "task/accuracy", "task/macro_f1"} <= found[0].keys()
  lines = path.read_text().splitlines()[:-2]  # the last two came later
  data = [json.loads(line) for line in in_training.sample(lines, 30)]
  got = jaxgpt.load(run).predict([row["text"] for row in data])
  same = np.mean([p["label"] == row["label"] for p, row in zip(got, data, strict=True)])
  assert found[1]["task/accuracy"] == pytest.approx(same)


def test_the_command_writes_what_the_interface_gives_and_scores_it(
  trained, tmp_path, capsys, monkeypatch
):
  run, path = trained
  out = tmp_path / "out.jsonl"
  args = ["predict", f"--workdir={run}", f"--input={path}"]
  assert main([*args, f"--output={out}", "--task=sentiment", "--batch-size=4"]) == 0
  printed = capsys.readouterr()
  assert "119 rows, 118 predictions; 1 rows without one" in printed.err
  assert "no 'text' in" in printed.err and "baseline: majority class" in printed.out
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  got = jaxgpt.load(run).predict([TEXTS[0], TEXTS[1]], batch_size=4)
  for line, want in zip(lines, got, strict=False):
    assert line["label"] == want["label"]
    assert line["probabilities"]["long"] == pytest.approx(want["probabilities"]["long"], abs=2e-6)
  assert lines[117]["row"] == "rows.jsonl:118" and "error" in lines[117]
  screen = terminal.Terminal()
  monkeypatch.setattr(sys, "stderr", screen)
  monkeypatch.setenv("TERM", "xterm")
  assert main([*args, "--output=-", "--batch-size=4"]) == 0
  assert capsys.readouterr().out == out.read_text()
  assert "0/119 rows  compiling …" in screen.text and "119/119 rows" in screen.text
  best = jaxgpt.load(run, "best").run.step
  assert best in (2, 4)


def test_labels_by_place_and_files_passed_over(trained, tmp_path, capsys):
  run, _ = trained
  given = tmp_path / "given"
  given.mkdir()
  (given / "a.pdf").write_text("")
  scores = []
  for names in (("long", "short"), (0, 1), ("Long", "SHORT")):
    rows_ = [{"text": t, "label": names[len(t) <= 12]} for t in TEXTS[:16]]
    (given / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    words = [f"--workdir={run}", f"--input={given}", f"--output={tmp_path}/out.jsonl"]
    assert main(["predict", *words, "--task=sentiment", "--json"]) == 0
    printed = capsys.readouterr()
    scores.append(json.loads(printed.out)["scores"])
    assert "passed over: 1 with suffix .pdf, such as given/a.pdf" in printed.err
  assert scores[0] == scores[1] == scores[2] and scores[0]["accuracy"][0] > 0
  (given / "a.jsonl").write_text('{"text": "a", "label": 1}\n')
  assert main(["evaluate", f"--workdir={run}", f"--data={given}", "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["tokens"] == 1
  (given / "a.jsonl").write_text('{"text": "a", "label": "other"}\n')
  assert main(["predict", *words[:2], f"--output={tmp_path}/no.jsonl", "--task=sentiment"]) == 2
  assert "a.jsonl:1: label 'other' is not among" in capsys.readouterr().err
  assert not list(tmp_path.glob("no.jsonl*"))


def test_training_refuses_a_task_that_cannot_score_its_rows(trained, tmp_path):
  run, path = trained
  c = run_folder.read_config(run).copy_and_resolve_references()
  c.task.data, c.task.fields = str(path), ()
  c.task.name = "regression"
  with pytest.raises(UserError, match="task.data=.*: this task scores numbers, but the model"):
    loop.train(c, tmp_path / "run", {}, evaluator_makers=in_training.EVALUATORS)


@pytest.mark.parametrize(
  "options, message",
  [
    (["--output=-", "--task=sentiment"], "--task=sentiment scores a file"),
    (["--output=x", "--task=sentimnt"], "did you mean 'sentiment'"),
    (["--output=x", "--json"], "--json prints the scores of --task"),
    (
      ["--output=x", "--kind=chat"],
      "--kind=chat: this run predicts for rows of kind classification",
    ),
    (["--output=x", "--task=translation"], "scores rows of kind seq2seq"),
    (["--output=x", "--task=regression"], "scores numbers, but the model predicts classes"),
    (["--output=x", "--max-new=9"], "--max-new=9 is for models that write text, and this one does"),
    (["--output=x", "--temperature=0.5"], "--temperature=0.5 is for models that write text"),
    (["--output=x", "--format=lines", "--field=text=a"], "field=text=a has no effect"),
    (["--output=x", "--step=worst"], "neither the step of a checkpoint nor best"),
  ],
)
def test_wrong_options_end_in_one_line(trained, options, message, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  run, path = trained
  try:
    code = main(["predict", f"--workdir={run}", f"--input={path}", *options])
  except SystemExit as e:  # argparse
    code = e.code
  assert code == 2 and message in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == []


def test_importing_the_package_stays_light():
  code = "import sys, jaxgpt; print('jax' in sys.modules); jaxgpt.load; print('jax' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.stdout.split() == ["False", "True"], done.stderr
  with pytest.raises(AttributeError):
    getattr(jaxgpt, "nothing")  # noqa: B009
