"""Inputs that break readers: each is survived or refused in one message, and the counts add up."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import socket

import pytest

from jaxgpt.errors import UserError, printable
from jaxgpt.storage.passed_over import PassedOver
from jaxgpt.text.prepare import prepare
from jaxgpt.text.readers import documents

GOOD = "A document that is fine.\n"
LINES = b"".join(json.dumps({"text": f"line {i} {i * 7919}"}).encode() + b"\n" for i in range(3000))


def jsonl(*values):
  return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def parquet(names, *columns):
  pyarrow, parquet = (pytest.importorskip(m) for m in ("pyarrow", "pyarrow.parquet"))
  out = io.BytesIO()
  parquet.write_table(pyarrow.table([pyarrow.array(c) for c in columns], names.split()), out)
  return out.getvalue()


def zstd(data):
  return pytest.importorskip("zstandard").compress(data)


def messages(*values):
  return jsonl(*({"messages": value} for value in values))


def warc(text):
  """A record of a WET file."""
  head = f"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: {len(text)}\r\n\r\n"
  return head.encode() + text + b"\r\n\r\n"


def socket_at(path):
  with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as s:
    s.bind(path.name)


def link(target):
  return lambda path: path.symlink_to(target)


# name: (file, content or a function that makes it, documents kept, {rule: dropped}, options)
SURVIVED = {
  "empty file": ("a.txt", b"", 0, {"empty": 1}),
  "white space": ("a.txt", " \n\u2003\t".encode(), 0, {"empty": 1}),
  "picture called text": ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", 0, {"binary": 1}),
  "latin-1": ("a.txt", "Grüße".encode("latin-1"), 0, {"invalid utf-8": 1}),
  "utf-16": ("a.txt", "Hello".encode("utf-16"), 1, {}),
  "utf-16 without a mark": ("a.txt", "Hello".encode("utf-16-le"), 0, {"binary": 1}),
  "byte order mark and old line ends": ("a.txt", b"\xef\xbb\xbfone\rtwo\r\n", 1, {}),
  "half a json line": ("a.jsonl", b'{"text": "x"}\n{"text": "y', 1, {"invalid json": 1}),
  "blank lines and crlf": ("a.jsonl", b'\r\n{"text": "x"}\r\n \r\n{"text": "y"}', 2, {}),
  "zeros in json": ("a.jsonl", b'{"text": "x"}\n' + bytes(500) + b"\n", 1, {"invalid json": 1}),
  "no utf-8 in json": ("a.jsonl", b'{"text": "\xff"}\n{"text": "x"}', 1, {"invalid utf-8": 1}),
  "half a character": ("a.jsonl", b'{"text": "\\ud83d"}\n', 0, {"invalid utf-8": 1}),
  "json too deep": ("a.jsonl", b"[" * 200_000 + b"\n", 0, {"invalid json": 1}),
  "number too long": (
    "a.jsonl",
    b'{"text": "x", "n": ' + b"9" * 9000 + b"}",
    0,
    {"invalid json": 1},
  ),
  "a key twice": ("a.jsonl", b'{"text": 1, "text": "x"}', 1, {}),
  "no number": ("a.jsonl", b'{"text": "x", "score": NaN, "n": -Infinity}', 1, {}),
  "json that is no object": ("a.jsonl", b'[1]\n"text"\n3\nnull\n', 0, {"missing field": 4}),
  "null text": ("a.jsonl", jsonl({"text": None}, {}), 0, {"missing field": 2}),
  "text of another type": (
    "a.jsonl",
    jsonl({"text": 3}, {"text": ["x"]}, {"text": {}}),
    0,
    {"wrong type": 3},
  ),
  "line of 200 MB": (
    "a.jsonl",
    lambda: jsonl({"text": "x" * 200_000_000}, {"text": "y"}),
    1,
    {"too long": 1},
  ),
  "truncated gzip": (
    "a.jsonl.gz",
    lambda: gzip.compress(LINES[:30_000]) + gzip.compress(LINES)[:9],
    1041,
    {"unreadable": 1},
  ),
  "garbage after gzip": (
    "a.jsonl.gz",
    gzip.compress(jsonl({"text": "x"})) + b"garbage",
    1,
    {"unreadable": 1},
  ),
  "no gzip": ("a.txt.gz", b"\0\1\2\3 not compressed", 0, {"binary": 1}),
  "a bomb": ("a.jsonl.gz", lambda: gzip.compress(b"0" * 90_000_000), 0, {"too long": 1}),
  "damaged xz": ("a.txt.xz", lambda: lzma.compress(LINES)[:500] + bytes(99), 0, {"unreadable": 1}),
  "damaged zstandard": ("a.txt.zst", lambda: zstd(LINES)[:-50] + bytes(50), 0, {"unreadable": 1}),
  "truncated zstandard": ("a.txt.zst", lambda: zstd(LINES)[:-9], 0, {"unreadable": 1}),
  "no parquet": ("a.parquet", b"PAR1 and then nothing", 0, {"unreadable": 1}),
  "truncated parquet": ("a.parquet", lambda: parquet("text", ["x"] * 9)[:-9], 0, {"unreadable": 1}),
  "parquet without the column": (
    "a.parquet",
    lambda: parquet("body", ["x"] * 9),
    0,
    {"missing field": 9},
  ),
  "parquet of numbers and nulls": (
    "a.parquet",
    lambda: parquet("text", [1, None, 2]),
    0,
    {"wrong type": 2, "missing field": 1},
  ),
  "parquet with a column twice": (
    "a.parquet",
    lambda: parquet("text text", ["x"], ["y"]),
    0,
    {"missing field": 1},
  ),
  "csv with an open quote": ("a.csv", b'text,n\nx,1\n"y,2\nz,3\n', 2, {"invalid csv": 1}),
  "csv with zeros": ("a.csv", b"text\nx\n\0\0\n", 1, {"binary": 1}),
  "csv with ragged rows": ("a.csv", b"text,n\nx\ny,1\nz,2,3\n", 1, {"invalid csv": 2}),
  "csv without the column": ("a.csv", b"body,n\nx,1\ny,2\n", 0, {"missing field": 1}),
  "csv with a field of 1 MB": ("a.csv", b'text\n"' + b"x\n" * 500_000 + b'"\n', 1, {}),
  "json array that breaks off": (
    "a.json",
    b'[{"text": "x"}, {"text": "y"}, {"te',
    2,
    {"invalid json": 1},
  ),
  "no web archive": ("a.warc", b"once upon a time\n" * 50, 0, {"invalid warc": 1}),
  "link to nothing": ("a.txt", link("nowhere"), 0, {"unreadable": 1}),
  "link to its own folder": ("a", link("."), 0, {}),
  "a link to a file that is there": ("z.txt", link("good.txt"), 0, {}),
  "a pipe": ("a.txt", os.mkfifo, 0, {}),
  "a folder called like a file": ("a.txt", os.mkdir, 0, {}),
  "a name that is no utf-8": (b"\xff\n.txt", b"x", 1, {}),
  "half a unit of utf-16": ("a.txt", "Hello".encode("utf-16")[:-1], 0, {"invalid utf-8": 1}),
  "utf-32": ("a.txt", "Hello".encode("utf-32"), 1, {}),
  "utf-16, the other end first": ("a.csv", b"\xfe\xff" + "text\nx\n".encode("utf-16-be"), 1, {}),
  "utf-16 in json lines": ("a.jsonl", '{"text": "x"}\n{"text": "y"}'.encode("utf-16"), 2, {}),
  "nothing but a mark": ("a.txt", b"\xff\xfe", 0, {"empty": 1}),
  "a mark in the middle": ("a.txt", "a\ufeffb".encode(), 1, {}),
  "control characters": ("a.txt", bytes(range(1, 128)), 1, {}),
  "zero at the end": ("a.txt", b"text\0", 0, {"binary": 1}),
  "a line of 5 MB": ("a.txt", b"x" * 5_000_000, 1, {}),
  "an overlong character": ("a.txt", b"\xc0\xaf", 0, {"invalid utf-8": 1}),
  "half of the last character": ("a.txt", "ü".encode()[:1], 0, {"invalid utf-8": 1}),
  "a colon and a number in the name": ("a.txt:7", b"x", 0, {}),
  "a long name": ("n" * 250 + ".txt", b"x", 1, {}),
  "escapes in the name": ("\x1b[31m\x07.txt", b"x", 1, {}),
  "the other direction in the name": ("\u202etxt.jsonl", b"{}", 0, {"missing field": 1}),
  "a device": ("a.txt", link("/dev/zero"), 0, {}),
  "a socket": ("a.txt", socket_at, 0, {}),
  "an unknown suffix": ("a.pdf", b"%PDF-1.4", 0, {}),
  "no suffix": ("LICENSE", b"x", 0, {}),
  "a hidden file": (".a.txt", b"x", 0, {}),
  "json lines with commas": ("a.jsonl", b'{"text": "x"},\n{"text": "y"},', 0, {"invalid json": 2}),
  "json lines of python": ("a.jsonl", b"{'text': 'x'}", 0, {"invalid json": 1}),
  "two objects on a line": ("a.jsonl", b'{"text": "x"}{"text": "y"}', 0, {"invalid json": 1}),
  "an array in json lines": ("a.jsonl", b'[{"text": "x"}]', 0, {"missing field": 1}),
  "an object over many lines": ("a.jsonl", b'{\n"text": "x"\n}', 0, {"invalid json": 3}),
  "a key in other letters": ("a.jsonl", b'{"Text": "x"}', 0, {"missing field": 1}),
  "an escaped zero": ("a.jsonl", b'{"text": "a\\u0000b"}', 1, {}),
  "a bare control character": ("a.jsonl", b'{"text": "a\x01b"}', 0, {"invalid json": 1}),
  "an object too deep": (
    "a.jsonl",
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    0,
    {"invalid json": 1},
  ),
  "empty json lines": ("a.jsonl", b"", 0, {}),
  "no newline but returns": (
    "a.jsonl",
    b'{"text": "x"}\r{"text": "y"}\r',
    0,
    {"invalid json": 1},
  ),
  "json array whose first object lacks the column": (
    "a.json",
    b'[{"id": 1}, {"text": "x"}, {"text": "y"}]',
    2,
    {"missing field": 1},
  ),
  "json with the records under a key": ("a.json", b'{"n": 2, "data": [{"text": "x"}]}', 1, {}),
  "json array of strings": ("a.json", b'["x", "y", null]', 2, {"missing field": 1}),
  "json array with a comma too many": (
    "a.json",
    b'[{"text": "x"}, ]',
    1,
    {"invalid json": 1},
  ),
  "json array without commas": ("a.json", b'[{"text": "x"} {"text": "y"}]', 1, {"invalid json": 1}),
  "text after a json array": ("a.json", b'[{"text": "x"}]]', 1, {"invalid json": 1}),
  "json array too deep": ("a.json", b'[{"a":' * 100_000, 0, {"invalid json": 1}),
  "an empty json array": ("a.json", b"[]", 0, {}),
  "an empty json file": ("a.json", b"", 0, {"empty": 1}),
  "json that is a number": ("a.json", b"3", 1, {}),
  "half a json object": ("a.json", b'{"text": "x', 0, {"invalid json": 1}),
  "json array of other columns": ("a.json", b'[{"q": "x"}, {"q": "y"}]', 0, {"missing field": 2}),
  "truncated json in gzip": (
    "a.json.gz",
    lambda: gzip.compress(b"[" + b",".join(LINES.splitlines()) + b"]")[:-20],
    2998,
    {"unreadable": 1},
  ),
  "csv with an open quote and many rows": (
    "a.csv",
    b'text,n\n"x,1\n' + b"y,2\n" * 5000,
    5000,
    {"invalid csv": 1},
  ),
  "csv with an open quote in the first row": (
    "a.csv",
    b'"text,n\n' + b"y,2\n" * 50,
    0,
    {"invalid csv": 1},
  ),
  "csv with nothing but a first row": ("a.csv", b"text,n\n", 0, {}),
  "empty csv": ("a.csv", b"", 0, {}),
  "csv with returns only": ("a.csv", b"text\rx\ry\r", 0, {"invalid csv": 1}),
  "csv with another delimiter": ("a.csv", b"text;n\nx;1\n", 0, {"missing field": 1}),
  "csv with a text after a quote": ("a.csv", b'text,n\n"x"y,1\nz,2\n', 1, {"invalid csv": 1}),
  "csv with a column twice": ("a.csv", b"text,text\nx,y\n", 0, {"missing field": 1}),
  "csv in latin-1": ("a.csv", "text\nä\nb\n".encode("latin-1"), 1, {"invalid utf-8": 1}),
  "csv of 5,000 columns": (
    "a.csv",
    lambda: (",".join(["text", *map(str, range(5000))]) + "\nx" + "," * 5000 + "\n").encode(),
    1,
    {},
  ),
  "tsv with an open quote": ("a.tsv", b'text\tn\n"x\t1\ny\t2\n', 2, {}),
  "parquet without rows": ("a.parquet", lambda: parquet("text", []), 0, {}),
  "parquet of bytes and lists": (
    "a.parquet",
    lambda: parquet("text x", [b"x"], [["y"]]),
    0,
    {"wrong type": 1},
  ),
  "a web archive that is cut": (
    "a.warc.gz",
    lambda: b"".join(gzip.compress(warc(b"page %d" % i)) for i in range(50))[:-9],
    50,  # only the end of the compression is missing
    {"unreadable": 1},
  ),
  "an empty web archive": ("a.warc", b"", 0, {}),
  "a web archive of one cut header": ("a.warc", b"WARC/1.0\r\nWARC-Ty", 0, {"invalid warc": 1}),
  "gzip in gzip": ("a.txt.gz", lambda: gzip.compress(gzip.compress(b"x")), 0, {"binary": 1}),
  "empty gzip": ("a.txt.gz", b"", 0, {"empty": 1}),
  "gzip of nothing": ("a.jsonl.gz", gzip.compress(b""), 0, {}),
  "zip called gzip": ("a.txt.gz", b"PK\x03\x04\x14\0\0\0", 0, {"binary": 1}),
  "truncated bzip2": ("a.txt.bz2", lambda: bz2.compress(LINES)[:-30], 0, {"unreadable": 1}),
  "labels that are missing": (
    "a.csv",
    b"text,label\nx,\ny\nz,1\n",
    1,
    {"invalid csv": 1, "wrong type": 1},
    {"kind": "classification"},
  ),
  "messages in broken json": (
    "a.csv",
    b'messages\n"[{""role"": ""user"""\n[]\n',
    0,
    {"wrong type": 1, "empty": 1},
    {"kind": "chat"},
  ),
  "a pair without a target": (
    "a.jsonl",
    jsonl({"input": "x"}, {"input": None, "target": "y"}, {"input": 1, "target": "y"}),
    0,
    {"missing field": 2, "wrong type": 1},
    {"kind": "seq2seq"},
  ),
  "messages that are none": (
    "a.jsonl",
    messages("hi", {"role": "user"}, [3], [{"role": "user"}], [["user", "hi"]]),
    0,
    {"wrong type": 5},
    {"kind": "chat"},
  ),
  "weights that are none": (
    "a.jsonl",
    messages(
      *(
        [
          {"role": "user", "content": GOOD},
          {"role": "assistant", "content": GOOD, "weight": weight},
        ]
        for weight in ("0", "1", 0.5, -1, [0], 0, 1, True, None)
      )
    ),
    4,
    {"wrong type": 5},
    {"kind": "chat"},
  ),
  "messages without content": (
    "a.jsonl",
    messages(None, [], [{"role": "user", "content": None}], [{"role": "user", "content": " "}]),
    0,
    {"missing field": 1, "empty": 2, "wrong type": 1},
    {"kind": "chat"},
  ),
  "labels that are none": (
    "a.jsonl",
    jsonl(
      {"text": "x"},
      {"text": "x", "label": None},
      {"text": "x", "label": []},
      {"text": "x", "label": float("nan")},
      {"text": "x", "label": "\udc80"},
      {"text": "x", "label": float("inf")},
      {"text": "x", "label": 10**400},
    ),
    0,
    {"missing field": 2, "wrong type": 4, "invalid utf-8": 1},
    {"kind": "classification"},
  ),
  "a text among tables": ("a.txt", b"x", 0, {"missing field": 1}, {"kind": "seq2seq"}),
}
KINDS = {
  "chat": {"messages": [{"role": "user", "content": GOOD}, {"role": "assistant", "content": GOOD}]},
  "classification": {"text": GOOD, "label": 1},
  "seq2seq": {"input": "", "target": GOOD},
}


@pytest.mark.parametrize("name", SURVIVED)
def test_survived(tmp_path, name):
  file, content, kept, dropped, options = (*SURVIVED[name], {})[:5]
  for suffix, module in ((".parquet", "pyarrow"), (".warc", "warcio")):
    if os.fsencode(file).endswith(suffix.encode()):
      pytest.importorskip(module)
  folder = tmp_path / "in"
  folder.mkdir()
  if "kind" in options:
    (folder / "good.jsonl").write_bytes(jsonl(KINDS[options["kind"]]))
  else:
    (folder / "good.txt").write_text(GOOD)
  path = folder / os.fsdecode(file)
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif callable(content) and content.__name__ == "<lambda>" and content.__code__.co_argcount == 0:
    path.write_bytes(content())
  else:
    content(path)
  account, rest = documents.Dropped(), PassedOver()
  listed = documents.find(folder, (), rest)
  found = list(documents.documents(listed, dropped=account, **options))
  there = [entry for entry in os.scandir(folder) if not entry.is_dir(follow_symlinks=False)]
  assert len(listed) + sum(rest.counts.values()) == len(there)
  assert len(found) == kept + 1
  assert account.counts == dropped
  assert account.read == len(found) + sum(dropped.values()) and account.kept == len(found)
  assert all(
    isinstance(file, bytes) or printable(file) in e
    for examples in account.examples.values()
    for e in examples
  )
  manifest = prepare.prepare(
    [folder], tmp_path / "out", tokenizer="bytes", validation=0, test=0, cut_chars=0, **options
  )
  unlearned = {"nothing learned": 1} if name == "weights that are none" else {}  # weight 0
  assert manifest["dropped"] == dropped | unlearned
  assert manifest["total"]["documents"] == len(found) - len(unlearned)


@pytest.mark.parametrize(
  "files, options, message",
  [
    (["missing.txt"], {}, "no such file or folder"),
    (["*.zip"], {}, "matches no file"),
    (["pipe"], {}, "is a pipe or device"),
    (["x" * 5000], {}, "can't be read"),
    ([], {}, "no file"),
    (["bad.jsonl"], {"max_errors": 2}, r"3 broken records.*bad.jsonl:3: Expecting value"),
    (["bad.jsonl"], {"max_bytes": 3}, "max_record_bytes=3"),
    (["bad.jsonl"], {"kind": "poems"}, "kind='poems': choose one of text"),
    (["bad.jsonl"], {"fields": {"label": "x"}}, "'label' does not exist in kind=text"),
    (["bad.jsonl"], {"form": "xlsx"}, "format='xlsx': choose one of text"),
    (["http://127.0.0.1:9/a.txt"], {}, "can't be reached|pip install"),
    (["s4://bucket/a.txt"], {}, "Protocol not known|pip install"),
  ],
)
def test_refused(tmp_path, files, options, message):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "bad.jsonl").write_bytes(b"x\n" * 50)
  paths = [f if "://" in f else os.path.join(tmp_path, f) for f in files]
  with pytest.raises(UserError, match=message) as error:
    list(documents.documents(documents.find(paths), **options))
  assert "\n" not in str(error.value)
  with pytest.raises(UserError, match=message if not options else None):
    prepare.prepare(paths, tmp_path / "out", tokenizer="bytes")
  assert not (tmp_path / "out").exists()


def test_there_are_a_hundred_of_them():
  """With those of tests/commands/hostile_data_test.py there are more than 150."""
  assert len(SURVIVED) >= 110
