"""What `documents` reads, leaves out, and says."""

import json

import pytest

from jaxgpt.errors import UserError
from jaxgpt.text import read


def write(folder, files):
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_a_folder_is_read_in_sorted_order_without_hidden_and_unknown_files(tmp_path):
  write(tmp_path / "corpus", {
      "b.txt": "two\r\n", "a/z.md": "one", "a/__pycache__/x.txt": "no", ".git/c.txt": "no",
      ".hidden.txt": "no", "image.png": "no", "c.py": b"\xef\xbb\xbfthree"})
  got = list(read.documents(read.find(tmp_path / "corpus")))
  assert [(d.source, d.text) for d in got] == [
      ("corpus/a/z.md", "one"), ("corpus/b.txt", "two\r\n"), ("corpus/c.py", "three")]


def test_sources_do_not_depend_on_where_the_folder_is(tmp_path):
  for place in ("here", "there/deeper"):
    write(tmp_path / place / "corpus", {"a.txt": "x", "b/c.jsonl": '{"text": "y"}\n'})
  here, there = (list(read.documents(read.find([tmp_path / p / "corpus"]))) for p in ("here", "there/deeper"))
  assert here == there
  assert here[1].source == "corpus/b/c.jsonl:1"


def test_patterns_and_files_given_twice_are_read_once(tmp_path):
  write(tmp_path, {"a.txt": "a", "d/b.txt": "b", "d/e/c.log": "c"})
  paths = [f"{tmp_path}/**/*.txt", tmp_path / "a.txt", f"{tmp_path}/d/*/*.log"]
  assert [d.text for d in read.documents(read.find(paths))] == ["a", "b", "c"]


@pytest.mark.parametrize("exclude, left", [
    ((), ["ka", "a", "t", "tb"]), (("tests",), ["ka", "a"]), (("test*",), ["ka", "a"]),
    (("keep/*",), ["a", "t", "tb"]), ("*b*", ["ka", "a", "t"])])
def test_exclude_matches_any_part_below_the_given_folder(tmp_path, exclude, left):
  root = tmp_path / "test_root"
  write(root, {"keep/a.txt": "ka", "src/a.txt": "a", "tests/t.txt": "t", "tests/x/b.txt": "tb"})
  assert [d.text for d in read.documents(read.find(root, exclude))] == left


def test_what_cannot_be_read_is_counted_and_the_rest_goes_on(tmp_path):
  lines = [b'{"text": "good"}', b"", b"{broken", b'{"body": "x"}', b'{"text": 3}',
           b'{"text": "\xff"}', b'{"text": " \\n"}', b'{"text": "\\ud800"}', b'["text"]',
           b'{"text": "last"}']
  write(tmp_path, {"a.jsonl": b"\n".join(lines), "b.txt": b"\xff\xfe", "c.txt": "",
                   "d.txt": "fine"})
  dropped = read.Dropped()
  texts = [d.text for d in read.documents(read.find(tmp_path), dropped=dropped)]
  assert texts == ["good", "last", "fine"]
  assert dropped.counts == {"invalid json": 1, "missing field": 2, "wrong type": 1,
                            "invalid utf-8": 3, "empty": 2}
  report = "\n".join(dropped.lines())
  assert "a.jsonl:3: " in report
  assert "b.txt: invalid start byte at byte 0" in report


def test_only_the_first_examples_of_a_rule_are_kept(tmp_path):
  write(tmp_path, {"a.jsonl": "nonsense\n" * 100})
  dropped = read.Dropped()
  assert list(read.documents(read.find(tmp_path), dropped=dropped)) == []
  assert dropped.counts == {"invalid json": 100}
  assert len(dropped.lines()) == 1 + read.EXAMPLES


def test_another_field_holds_the_text(tmp_path):
  write(tmp_path, {"a.jsonl": json.dumps({"content": "x", "text": "y"})})
  assert next(read.documents(read.find(tmp_path), fields={"text": "content"})).text == "x"


@pytest.mark.parametrize("path, message", [
    ("missing", "no such file or folder"), ("*.none", "matches no file"),
    ("empty", "no file to read")])
def test_nothing_to_read_is_an_error_of_the_call_itself(tmp_path, path, message):
  write(tmp_path, {"empty/x.bin": "x"})
  with pytest.raises(UserError, match=message):
    read.find([tmp_path / path])


def test_chunks_join_to_the_text_and_end_after_lines():
  text = "ab\ncdefg\n\nhijklmnop"
  assert list(read.chunks(text, 4)) == ["ab\n", "cdef", "g\n\n", "hijk", "lmno", "p"]
  assert list(read.chunks("", 4)) == [""]
