"""Data of pairs, in the tokens of the tiny corpus."""

import json

import pytest

from jaxgpt.text.prepare import prepare, shards


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
  """A prepared folder of kind preference."""
  folder = tmp_path_factory.mktemp("pairs")
  rows = [{"prompt": f"{i} cats ", "chosen": "sat", "rejected": "ran"} for i in range(30)]
  (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  prepare.prepare(
    folder / "pairs.jsonl",
    folder / "data",
    tokenizer="bytes",
    kind="preference",
    validation=0.2,
    test=0.0,
    cut_chars=0,
  )
  return str(folder / "data")


@pytest.fixture
def on_pairs(pairs):
  """A function (run) -> the same run, as if it had been trained on preferences."""

  def changed(run):
    c = run.c.copy_and_resolve_references()
    c.objective.name, c.data.path = "preference", pairs
    return run._replace(c=c, data_digest=shards.read_manifest(pairs)["digest"])

  return changed
