"""Evaluation of classes: the loop's numbers, and calibration by its definition."""

import json

import jax
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.inference import evaluate, load
from jaxgpt.model import transformer
from jaxgpt.run import generation
from jaxgpt.text.prepare import prepare
from jaxgpt.text.tokenizers.base import ByteTokenizer
from tests import quick

TEXT, NAMES = ByteTokenizer(), ("a", "b", "c")
WORDS = ("red", "blue", "cold", "warm")
ROWS = {
  "multi_label": [
    {"text": WORDS[i % 4] * (1 + i % 3), "labels": list(NAMES[: i % 4])} for i in range(40)
  ],
  "tagging": [
    {"words": [WORDS[i % 4], WORDS[i % 3]], "tags": [NAMES[i % 3], NAMES[i % 2]]} for i in range(40)
  ],
  "classification": [
    {"text": WORDS[i % 4] * (1 + i % 3), "label": NAMES[i % 3]} for i in range(40)
  ],
}
OBJECTIVES = {
  "multi_label": ("multi_label", "classifier"),
  "tagging": ("token_classification", "token_classifier"),
  "classification": ("classification", "classifier"),
}


def run_of(kind, causal):
  """A run of random weights, without a folder."""
  c = config.base()
  c.objective.name, c.model.head = OBJECTIVES[kind]
  c.model.update(dict(num_layers=1, width=16, num_heads=2, position="rotary", causal=causal))
  c.model.update(dict(num_labels=3, label_names=NAMES, init_std=0.5))
  c.model.pooling = "last" if causal and c.model.head == "classifier" else "first"
  c.data.update(dict(seq_len=24, batch_size=8))
  c.mesh.update(dict(data=2, fsdp=2, seq=2) if causal else dict(data=-1, fsdp=1))
  c = config.resolve(c, TEXT.vocab_size)
  mesh, parts = load.place(c)
  params = jax.jit(lambda: transformer.init(parts.model, jax.random.key(0)))()
  params = jax.device_put(params, jax.tree.map(lambda s: s.sharding, parts.state["params"]))
  ends = generation.Generation({"eos_token_id": [TEXT.eos_id]})
  return load.Run(c, parts, mesh, params, 0, TEXT, "", ends)


def outputs(run, texts):
  """The model's outputs for texts, each in a row of its own."""
  tokens, segments = np.zeros((2, len(texts), 24), np.int32)
  for row, text in enumerate(texts):
    ids = [TEXT.bos_id, *TEXT.encode(text), TEXT.eos_id]
    tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
  positions = np.arange(24, dtype=np.int32) * segments
  with jax.set_mesh(run.mesh):
    out = jax.jit(lambda p, *xs: run.parts.model.apply({"params": p}, *xs).logits)
    return np.asarray(out(run.params, tokens, positions, segments), np.float64)


def choices(kind, run):
  """(confidence, right) of each choice, in any order."""
  rows = ROWS[kind]
  texts = [row["text"] if "text" in row else " ".join(row["words"]) for row in rows]
  x = outputs(run, texts)
  if kind == "multi_label":
    p = 1 / (1 + np.exp(-x))
    has = np.array([[name in row["labels"] for name in NAMES] for row in rows])
    return np.maximum(p, 1 - p).reshape(-1), ((p > 0.5) == has).reshape(-1)
  if kind == "tagging":
    x = np.concatenate([x[i, [1, 2 + len(row["words"][0])]] for i, row in enumerate(rows)])
    labels = [tag for row in rows for tag in row["tags"]]
  else:
    labels = [row["label"] for row in rows]
  p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
  return p.max(-1), p.argmax(-1) == [NAMES.index(name) for name in labels]


@pytest.mark.parametrize(
  "kind, causal",
  quick.first(
    [("tagging", False), ("multi_label", True), ("multi_label", False), ("classification", False)],
    1,
  ),
)
def test_classes_are_scored_and_calibrated_by_definition(kind, causal, tmp_path):
  run = run_of(kind, causal)
  (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
  data = str(tmp_path / "data")
  names = {"labels": ",".join(NAMES)}
  prepare.prepare(
    [tmp_path / "in.jsonl"], data, kind=kind, tokenizer="bytes", validation=0, test=0, **names
  )
  with evaluate.opened(run, tmp_path, evaluate.Source(data, "train"), 8) as opened:
    got, found = evaluate.evaluate(run, opened)
  confidence, right = choices(kind, run)
  want = 0.0
  for i in range(15):
    here = (confidence >= i / 15) & (confidence < (i + 1) / 15)
    if here.any():
      want += here.mean() * abs(right[here].mean() - confidence[here].mean())
  assert got["calibration_error"] == pytest.approx(want, abs=1e-5) and want > 0.02
  of_loop = load.evaluate_run(run, "train", data=data)
  assert got.keys() == of_loop.keys() | {"calibration_error"}
  for name in of_loop.keys() - {"data_digest"}:
    assert got[name] == pytest.approx(of_loop[name], rel=1e-5), name
  assert all("perplexity" not in row for rows in found.tables().values() for row in rows)
