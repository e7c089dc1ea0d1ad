"""A masked language model becomes a model for each kind of labelled data, by the recipes' files."""

import json
import pathlib

import jax
import numpy as np
import pytest

from jaxgpt import tree
from jaxgpt.config import loading
from jaxgpt.inference import load
from jaxgpt.run import init_from
from jaxgpt.text.prepare import prepare
from jaxgpt.training import loop

CONFIGS = pathlib.Path(__file__).parents[3] / "configs" / "tasks"
WORDS = ("red", "blue", "cold", "warm")
ROWS = {
  "text": lambda i, word: {"text": f"{word} {i} {word}"},
  "classification": lambda i, word: {"text": f"{word} {i}", "label": word},
  "tagging": lambda i, word: {"words": [word, str(i)], "tags": [word, "cold"]},
  "question_answering": lambda i, word: {
    "question": "?",
    "context": f"{i} {word}",
    "answers": [{"text": word, "answer_start": len(f"{i} ")}],
  },
  "retrieval": lambda i, word: {"query": word, "positive": f"{i} {word}"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A function from a kind of data to its prepared folder."""
  root = tmp_path_factory.mktemp("labelled")

  def make(kind):
    path, out = root / f"{kind}.jsonl", root / kind
    rows = [ROWS[kind](i, WORDS[i % 4]) for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.prepare(path, out, tokenizer="bytes", kind=kind, validation=0, test=0, cut_chars=0)
    return str(out)

  return make


@pytest.fixture(scope="module")
def masked(data, tmp_path_factory):
  """The folder of a masked language model with BERT's head."""
  folder = tmp_path_factory.mktemp("masked") / "run"
  c, _ = loading.load(CONFIGS.parent / "masked_lm.py")
  c.model.update(dict(num_layers=1, width=16, num_heads=2, mlp_width=32))
  c.data.update(dict(path=data("text"), seq_len=16, batch_size=8))
  c.train.steps, c.schedule.warmup_steps, c.eval.every = 2, 1, 0
  loop.train(c, folder, {})
  return folder


@pytest.mark.slow
@pytest.mark.parametrize(
  "recipe, kind, fresh",
  [
    ("tagging", "tagging", ["head", "head_bias"]),
    ("retrieval", "retrieval", []),
    ("sentiment", "classification", ["head", "head_bias"]),
    ("question_answering", "question_answering", ["head", "head_bias"]),
  ],
)
def test_the_layers_are_taken_and_the_head_is_new(
  masked, data, tmp_path, capsys, recipe, kind, fresh
):
  c, _ = loading.load(f"{CONFIGS / recipe}.py:{masked}")
  c.data.update(dict(path=data(kind), seq_len=16, batch_size=8))
  c.model.num_labels = 4 if kind in ("classification", "tagging") else 2
  c.train.steps, c.schedule.warmup_steps, c.log.every, c.optim.lr = 1, 0, 1, 0.0
  loop.train(c, tmp_path / "run", {})
  report = json.loads((tmp_path / "run" / init_from.REPORT).read_text())
  old, new = (tree.flatten(load.load(folder).params) for folder in (masked, tmp_path / "run"))
  assert report["initialized"] == fresh
  assert report["loaded"] == sorted(new.keys() - fresh) and len(report["loaded"]) > 8
  of_head = ["head_bias", "head_dense", "head_norm/scale"]
  assert report["left"] == of_head
  for path in report["loaded"]:  # a step with a learning rate of 0 changes nothing
    np.testing.assert_array_equal(*jax.device_get((old[path], new[path])))
  told = capsys.readouterr().out
  assert f"{len(report['loaded'])} parameters loaded" in told
  assert f"{len(of_head)} not used: {', '.join(of_head)}" in told
  if fresh:
    assert f"{len(fresh)} initialized, because it has none: {', '.join(fresh)}" in told
