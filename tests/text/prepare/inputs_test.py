"""Inputs of a preparation: nothing is passed over in silence, and no change goes unnoticed."""

import gzip
import io
import json
import os
import sys

import pytest

from jaxgpt.data import source
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import inputs, jobs, prepare, shards
from jaxgpt.text.prepare.tasks import reading, tokenizing

OPTIONS = {"tokenizer": "bytes", "validation": 0, "test": 0}
LINES = b"".join(json.dumps({"text": f"text {i}"}).encode() + b"\n" for i in range(20))


def run(paths, out, **options):
  """(manifest, card, lines of the report) of a preparation."""
  lines = []
  manifest = prepare.prepare(paths, out, report=lines.append, **(OPTIONS | options))
  return manifest, json.loads((out / "card.json").read_text()), lines


def test_what_is_passed_over_is_in_the_report_the_manifest_and_the_card(tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  (folder / "a.jsonl").write_bytes(LINES)
  (folder / "b.json").write_text('{"a": 1}')
  (folder / "c.csv").write_text("body\nx\n")
  plain, _, _ = run([folder], tmp_path / "plain")
  for i in range(5):
    (folder / f"{i}.pdf").write_text("x")
  (folder / ".git").mkdir()
  manifest, card, lines = run([folder], tmp_path / "out")
  assert lines[0] == "passed over: 5 with suffix .pdf, such as in/0.pdf; 1 hidden, such as in/.git"
  assert manifest["passed_over"]["suffix .pdf"]["count"] == 5
  assert card["passed over"] == manifest["passed_over"]
  assert {what: x["examples"] for what, x in card["notes"].items()} == {
    "files of records without a document": ["in/c.csv"],
    "JSON files without records, each read as one text": ["in/b.json"],
  }
  assert "JSON files without records, each read as one text: 1, such as in/b.json" in lines
  text = (tmp_path / "out" / "card.md").read_text()
  assert "| suffix .pdf | 5 | in/0.pdf" in text and "in/c.csv" in text
  assert shards.read_manifest(tmp_path / "out") == manifest
  assert "passed_over" not in plain and manifest["digest"] == plain["digest"]


def test_names_of_documents_differ_and_keep_their_hash_signs(tmp_path):
  for place in ("x", "y"):
    (tmp_path / place / "c#1").mkdir(parents=True)
    (tmp_path / place / "c#1" / "a#b.jsonl").write_bytes(LINES)
  paths = [tmp_path / place / "c#1" for place in "xy"]
  _, card, lines = run(paths, tmp_path / "out")
  split = source.open_split(tmp_path / "out", "train")
  names = [split.source_name(i) for i in range(40)]
  assert len(set(names)) == 40
  assert names[0] == "c#1/a#b.jsonl:1" and names[20] == "c#1(2)/a#b.jsonl:1"
  assert set(card["sources"]) == {"c#1/….jsonl", "c#1(2)/….jsonl"}
  assert any(line.startswith(str(paths[1])) and "c#1(2)/a#b.jsonl" in line for line in lines)


@pytest.mark.parametrize(
  "source_name, group",
  [
    ("c#/a.txt", "c#/….txt"),
    ("c/a.txt#12", "c/….txt"),
    ("c/a.txt:7#12", "c/….txt"),
    ("a#b.jsonl:7", "a#b.jsonl"),
    ("a:b.txt", "a:b.txt"),
    ("c/a#1/b.jsonl:7", "c/….jsonl"),
  ],
)
def test_the_group_of_a_document(source_name, group):
  assert tokenizing._source_group(source_name) == group


@pytest.mark.parametrize("change", ["append", "replace", "delete", "touch"])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch, change):
  (tmp_path / "a.jsonl").write_bytes(LINES)
  (tmp_path / "b.jsonl").write_bytes(LINES)
  whole = reading.read_and_clean

  def read_then_change(*args, **kwargs):
    account = whole(*args, **kwargs)
    path = tmp_path / "b.jsonl"
    if change == "delete":
      path.unlink()
    elif change == "touch":
      os.utime(path, (1, 1))
    else:
      path.write_bytes(LINES + LINES if change == "append" else LINES.replace(b"text 1", b"text 9"))
      os.utime(path, (2, 2))
    return account

  monkeypatch.setattr(reading, "read_and_clean", read_then_change)
  with pytest.raises(UserError, match=r"1 input file\(s\) changed .*b.jsonl"):
    prepare.prepare([f"{tmp_path}/*.jsonl"], tmp_path / "out", **OPTIONS)
  assert not (tmp_path / "out").exists()
  monkeypatch.setattr(reading, "read_and_clean", whole)
  prepare.prepare([f"{tmp_path}/*.jsonl"], tmp_path / "out", **OPTIONS)


def test_a_new_file_is_reported(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(LINES)
  found = inputs.find([tmp_path])
  assert found.check_unchanged() == []
  (tmp_path / "b.jsonl").write_bytes(LINES)
  (line,) = found.check_unchanged()
  assert line.endswith("/b.jsonl") and "not read: 1" in line
  for name in ("a.jsonl", "b.jsonl"):
    (tmp_path / name).unlink()
  with pytest.raises(UserError, match="the input changed while it was read: no file to read"):
    found.check_unchanged()


@pytest.mark.parametrize(
  "data, form, count",
  [
    (LINES, "jsonl", 20),
    (gzip.compress(LINES, mtime=0), "jsonl", 20),
    (json.dumps([{"text": "a"}, {"text": "b"}]).encode(), "json", 2),
    (b"{just a text\n", "txt", 1),
    ("Grüße".encode("utf-16"), "txt", 1),
  ],
)
def test_standard_input_is_read_in_its_place(tmp_path, monkeypatch, data, form, count):
  (tmp_path / "a.txt").write_text("first")
  (tmp_path / "z.txt").write_text("last")
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
  paths = [tmp_path / "a.txt", "-", tmp_path / "z.txt"]
  manifest, _, lines = run(paths, tmp_path / "out", cut_chars=0)
  assert f"standard input: read as {form}, unless --format names another format" in lines
  split = source.open_split(tmp_path / "out", "train")
  names = [split.source_name(i) for i in range(manifest["kept"])]
  assert len(names) == count + 2 and (names[0], names[-1]) == ("a.txt", "z.txt")
  assert all(name.startswith("stdin") for name in names[1:-1])
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out", "z.txt"]


def test_standard_input_that_gives_nothing_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
  with pytest.raises(UserError, match="is empty"):
    prepare.prepare(["-"], tmp_path / "out", **OPTIONS)
  with pytest.raises(UserError, match="read once"):
    prepare.prepare(["-", "-"], tmp_path / "out", **OPTIONS)
  monkeypatch.setattr(sys, "stdin", None)
  with pytest.raises(UserError, match="is closed"):
    prepare.prepare(["-"], tmp_path / "out", **OPTIONS)
  assert not list(tmp_path.iterdir())


def test_an_interrupted_run_goes_on_with_the_same_standard_input(tmp_path, monkeypatch):
  def prepared(**options):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES)))
    return run(["-"], tmp_path / "out", **options)

  with pytest.raises(UserError, match="at most"):
    prepared(tokenizer="sentencepiece:60000")
  monkeypatch.setattr(reading, "read_and_clean", lambda *args: pytest.fail("read again"))
  manifest, _, lines = prepared()
  assert manifest["kept"] == 20 and any("continuing" in line for line in lines)


def test_a_run_deletes_neither_the_standard_input_of_another_nor_a_file_of_the_user(
  tmp_path, monkeypatch
):
  def prepared():
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES)))
    return run(["-"], tmp_path / "out")

  whole, mine, kept = reading.read_and_clean, tmp_path / "out.stdin.jsonl", []
  mine.write_bytes(LINES)

  def read_next_to_another_run(*args, **kwargs):
    with monkeypatch.context() as m, pytest.raises(UserError, match="another run is at work"):
      m.setattr(jobs, "_LOCK_TRIES", 1)
      prepared()
    kept.append(whole(*args, **kwargs))
    return kept[-1]

  monkeypatch.setattr(reading, "read_and_clean", read_next_to_another_run)
  assert prepared()[0]["kept"] == 20 and len(kept) == 1
  assert mine.read_bytes() == LINES
  assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.stdin.jsonl"]


def test_a_large_file_is_read_in_the_format_that_is_named(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(LINES)
  manifest, _, _ = run([tmp_path / "a.jsonl"], tmp_path / "out", format="text", task_bytes=100)
  assert manifest["kept"] == 1 and manifest["total"]["bytes"] == len(LINES)


@pytest.mark.parametrize("other", ["folder", "working directory"])
def test_an_interrupted_run_finds_its_inputs_in_another_place(tmp_path, monkeypatch, other):
  (tmp_path / "old" / "in").mkdir(parents=True)
  for i in range(3):
    (tmp_path / "old" / "in" / f"{i}.jsonl").write_bytes(LINES.replace(b"text ", b"%d " % i))
  monkeypatch.chdir(tmp_path / "old")
  path = {"folder": str(tmp_path / "old" / "in"), "working directory": "in"}[other]
  whole = reading.read_and_clean

  def interrupt(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(reading, "read_and_clean", interrupt)
  with pytest.raises(KeyboardInterrupt):
    run([path], tmp_path / "out", task_bytes=100)
  monkeypatch.setattr(reading, "read_and_clean", whole)
  monkeypatch.chdir(tmp_path)
  if other == "folder":
    (tmp_path / "old").rename(tmp_path / "new")
  path = tmp_path / ("new/in" if other == "folder" else "old/in")
  manifest, _, lines = run([path], tmp_path / "out", task_bytes=100)
  assert manifest["kept"] == manifest["read"] == 60
  assert any("continuing" in line for line in lines)


@pytest.mark.parametrize(
  "out, message",
  [
    ("/", "is the root"),
    ("", "is no name"),
    ("caf\udce9", r"caf\\udce9 is not UTF-8"),
    ("a\0b", "is no name"),
    ("x" * 300, "cannot be written"),
    ("/dev/null", "is not a prepared data folder"),
    ("/dev/null/x", "cannot be written"),
  ],
)
def test_outputs_that_cannot_be(tmp_path, monkeypatch, out, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a.jsonl").write_bytes(LINES)
  with pytest.raises(UserError, match=message):
    prepare.prepare(["a.jsonl"], out, **OPTIONS)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"encoding": "utf9"}, "did you mean 'utf-8'. no such encoding"),
    ({"delimiter": ";"}, "no input is a .csv file"),
    ({"delimiter": ";;", "format": "csv"}, "must be one character"),
    ({"delimiter": '"', "format": "csv"}, "must be one character"),
    ({"encoding": "latin-1", "format": "parquet"}, "the inputs tell theirs"),
    ({"exclude": ("nothing*",)}, "matches no file"),
  ],
)
def test_options_that_would_have_no_effect(tmp_path, options, message):
  if options.get("format") == "parquet":
    pytest.importorskip("pyarrow")
  (tmp_path / "a.jsonl").write_bytes(LINES)
  with pytest.raises(UserError, match=message):
    prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "out", **(OPTIONS | options))
