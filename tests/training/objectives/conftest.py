"""Small prepared folders of each kind of data."""

import json

import pytest

from jaxgpt.text.prepare import prepare
from jaxgpt.training import loop

WORDS = ("red", "blue", "cold", "warm", "old", "new")


def records(kind):
  """120 records of a pattern that a small model learns in some steps."""
  for i in range(120):
    word = WORDS[i % 6]
    text = f"{i % 20} {word} things"
    yield {
      "classification": {"text": f"{i} " + f"{word} " * (2 + i % 4), "label": word},
      "seq2seq": {"input": text, "target": word.upper()},
      "chat": {
        "messages": [
          {"role": "user", "content": text},
          {"role": "assistant", "content": word.upper()},
        ]
      },
      "preference": {"prompt": text + ": ", "chosen": word.upper(), "rejected": word},
      "text": {"text": f"{text}, {word} as ever {word}"},
    }[kind]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A function from a kind of data to its prepared folder."""
  root = tmp_path_factory.mktemp("objectives")

  def make(kind):
    if not (root / kind).exists():
      (root / f"{kind}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(kind)))
      prepare.prepare(
        root / f"{kind}.jsonl",
        root / kind,
        tokenizer="bytes",
        kind=kind,
        validation=0.2,
        test=0.0,
        cut_chars=0,
      )
    return str(root / kind)

  return make


@pytest.fixture(scope="session")
def teacher_run(tiny, tmp_path_factory):
  """A run of two steps."""
  folder = tmp_path_factory.mktemp("teacher") / "run"
  loop.train(tiny(train__steps=2, model__width=16, model__num_layers=1), folder, {})
  return folder
