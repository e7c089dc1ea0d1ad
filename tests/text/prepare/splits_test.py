"""Splits of a corpus: shares, files of their own, groups."""

import json

import pytest

from jaxgpt.commands import main
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import prepare, shards, splits
from tests.text.prepare.prepare_test import contents

ROWS = [{"text": f"document {i} of its author", "author": i % 40} for i in range(200)]


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.fixture
def train(tmp_path):
  return write(tmp_path / "train.jsonl", ROWS)


def make(paths, out, **options):
  """(manifest, the texts of each split, the report)."""
  lines = []
  manifest = prepare.prepare(paths, out, tokenizer="bytes", report=lines.append, **options)
  found = {s: contents(out, s) if manifest["splits"][s]["documents"] else [] for s in shards.SPLITS}
  return manifest, found, "\n".join(lines)


def texts(rows):
  return [row["text"] for row in rows]


def test_held_out_splits_have_files_of_their_own(train, tmp_path):
  held = [{"text": f"held out {i}"} for i in range(9)]
  dev, one, two = (
    write(tmp_path / f"{name}.jsonl", rows)
    for name, rows in (("dev", held[:4]), ("one", held[4:6]), ("two", held[6:]))
  )
  manifest, found, lines = make(train, tmp_path / "out", validation=dev, test=[one, str(two)])
  assert found == {
    "train": texts(ROWS),
    "validation": texts(held[:4]),
    "test": texts(held[4:]),
  }
  assert manifest["own_files"] == ["test", "validation"] and manifest["read"] == 209
  assert "validation: 1 file of its own" in lines and "test: 2 files of its own" in lines
  card = json.loads((tmp_path / "out" / "card.json").read_text())
  assert card["training documents with held-out text"] == 0


def test_a_share_stays_a_share_next_to_files(train, tmp_path):
  dev = write(tmp_path / "dev.jsonl", [{"text": "held out"}])
  _, found, _ = make(train, tmp_path / "out", validation=dev, test=0.2)
  assert found["validation"] == ["held out"] and 15 < len(found["test"]) < 70
  assert sorted(found["train"] + found["test"]) == sorted(texts(ROWS))


def test_a_held_out_file_below_path_is_not_trained_on(train, tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  write(folder / "a.jsonl", ROWS[:5])
  dev = write(folder / "dev.jsonl", ROWS[5:7])
  _, found, lines = make(folder, tmp_path / "out", validation=str(dev))
  assert found == {"train": texts(ROWS[:5]), "validation": texts(ROWS[5:7]), "test": []}
  assert "1 of the files in PATH are held out" in lines


def test_texts_that_are_trained_on_and_held_out_are_counted_or_removed(train, tmp_path):
  dev = write(tmp_path / "dev.jsonl", [*ROWS[:3], {"text": "held out"}])
  manifest, found, lines = make(train, tmp_path / "a", validation=dev)
  assert "3 training documents have the text of a document of validation or test" in lines
  assert "--dedup=exact" in lines and len(found["train"]) == 200
  assert "3 training documents have" in (tmp_path / "a" / "card.md").read_text()
  manifest, found, lines = make(train, tmp_path / "b", validation=dev, dedup=["exact"])
  assert found["train"] == texts(ROWS[3:]) and len(found["validation"]) == 4
  assert manifest["dropped"] == {"duplicate": 3} and "training documents have" not in lines


def test_decontamination_looks_for_the_files_of_held_out_splits(train, tmp_path):
  long = " ".join(f"word{i}" for i in range(30))
  write(train, [*ROWS, {"text": f"here it is: {long}"}])
  dev = write(tmp_path / "dev.jsonl", [{"text": long}])
  manifest, found, _ = make(train, tmp_path / "out", validation=dev, decontaminate=["held-out"])
  assert found["train"] == texts(ROWS) and found["validation"] == [long]
  assert list(manifest["dropped"].values()) == [1]


def test_all_documents_of_a_group_are_in_one_split(train, tmp_path):
  manifest, found, lines = make(
    train, tmp_path / "a", split_by="author", validation=0.2, test=0.2, salt="x"
  )
  authors = {row["text"]: row["author"] for row in ROWS}
  of_split = {split: {authors[text] for text in got} for split, got in found.items()}
  assert sum(map(len, of_split.values())) == len(set.union(*of_split.values())) == 40
  assert all(of_split.values()) and manifest["split_by"] == "author"
  assert f"40 groups, of which {len(of_split['validation'])} in validation" in lines
  # A group keeps its split when the corpus grows, and 1 and 1.0 and "1" are one group.
  more = [{"text": f"more {i}", "author": float(i) if i % 2 else str(i)} for i in range(40)]
  write(train, [*more, *ROWS[:40]])
  _, grown, _ = make(train, tmp_path / "b", split_by="author", validation=0.2, test=0.2, salt="x")
  for split, got in grown.items():
    assert {text.split()[1] for text in got} == {str(author) for author in of_split[split]}


def test_a_document_without_a_group_is_counted_and_named(train, tmp_path):
  (tmp_path / "a.txt").write_text("a text")
  write(train, [*ROWS, {"text": "x"}, {"text": "y", "author": [1]}])
  manifest, _, lines = make(
    [train, tmp_path / "a.txt"], tmp_path / "out", split_by="author", validation=0.2
  )
  assert manifest["dropped"] == {"missing field": 2, "wrong type": 1} and manifest["kept"] == 200
  assert "train.jsonl:201: no 'author' to split by: it has 'text'" in lines
  assert "a.txt: no 'author' to split by: a text has no columns" in lines
  with pytest.raises(UserError, match="no document for the training split.*column 'writer'"):
    make(train, tmp_path / "no", split_by="writer")


def test_a_share_that_comes_to_nothing_is_told(tmp_path):
  one = write(tmp_path / "one.jsonl", ROWS[:1])
  _, found, lines = make(one, tmp_path / "out", cut_chars=0, validation=0.01, test=0)
  assert not found["validation"] and "no document fell into validation" in lines
  assert "fell into test" not in lines


@pytest.mark.parametrize(
  "options, message",
  [
    ({"validation": [0.1, "a"]}, "validation=0.1, a: give one share"),
    ({"validation": [0.1, 0.2]}, "validation=0.1, 0.2: give one share"),
    ({"test": 1.0}, "test=1 must be at least 0 and below 1"),
    ({"test": float("nan")}, "test=nan must be"),
    ({"validation": 0.5, "test": 0.5}, "leave nothing to train on"),
    ({"validation": ""}, "validation='' is empty"),
    ({"validation": "nowhere.jsonl"}, "'nowhere.jsonl': no such file"),
    ({"validation": "train.jsonl"}, "no file is left to train on"),
    ({"validation": "dev.jsonl", "test": "dev.jsonl"}, "dev.jsonl is also a file of --test"),
    ({"validation": "dev.jsonl", "split_by": "author"}, "split_by='author' has no effect"),
    ({"validation": 0, "test": 0, "split_by": "author"}, "both shares are 0"),
  ],
)
def test_what_cannot_be_split_is_refused(train, tmp_path, monkeypatch, options, message):
  monkeypatch.chdir(tmp_path)
  write(tmp_path / "dev.jsonl", [{"text": "held out"}])
  with pytest.raises(UserError, match=message):
    prepare.prepare("train.jsonl", "out", tokenizer="bytes", **options)
  assert not (tmp_path / "out").exists()


def test_shares_and_files_on_the_command_line(train, tmp_path, capsys):
  for name in ("a", "b"):
    write(tmp_path / f"{name}.jsonl", [{"text": name}])
  more = [f"--validation={tmp_path}/{name}.jsonl" for name in ("a", "b")]
  args = ["data", str(train), f"--out={tmp_path}/out", "--tokenizer=bytes", "--test=2e-1"]
  assert main.main([*args, *more]) == 0
  found = shards.read_manifest(tmp_path / "out")
  assert found["splits"]["validation"]["documents"] == 2
  assert found["splits"]["test"]["documents"] > 10 and found["own_files"] == ["validation"]


def test_without_a_value_a_share_is_the_default_or_0_next_to_files():
  assert splits.shares((), ()) == (0.05, 0.05)
  assert splits.shares((0.3,), ()) == (0.3, 0.05)
  assert splits.shares(("dev.txt",), ()) == (0, 0)
  assert splits.shares((), ("test.txt",)) == (0, 0)
