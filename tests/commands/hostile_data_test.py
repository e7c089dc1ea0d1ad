"""Options and environments that break commands: each works, or is refused in one line."""

import io
import json
import os
import sys

import pytest

from jaxgpt.commands import main

OPTIONS = {"--out": "out", "--tokenizer": "bytes", "--executor": "process", "--validation": "0.2"}

ALL = ("--validation=0", "--test=0")
TRAINED = "--tokenizer=sentencepiece:290"

# name: (arguments in place of or next to the usual ones, words of the message or None if it works)
ARGUMENTS = {
  "the root": (["--out=/"], "is the root"),
  "no name": (["--out="], "is no name"),
  "a name that is no utf-8": (["--out=caf\udce9"], "is not UTF-8"),
  "a name with escapes": (["--out=\x1b[31mred"], None),
  "a name of 300 letters": (["--out=" + "x" * 300], "cannot be written"),
  "a name of 250 letters": (["--out=" + "x" * 250], "cannot be written"),
  "the input": (["--out=in.jsonl"], "not a prepared data folder"),
  "below the input": (["--out=in.jsonl/out"], "cannot be written"),
  "a device as output": (["--out=/dev/null"], "not a prepared data folder"),
  "below a device": (["--out=/dev/null/x/y"], "cannot be written"),
  "below /proc": (["--out=/proc/nothing/x"], "cannot be written"),
  "the folder above": (["--out=.."], "not a prepared data folder"),
  "this folder": (["--out=."], "not a prepared data folder"),
  "an unknown service": (["--out=foo://x/y"], "foo"),
  "zeros as tokenizer": (["--tokenizer=/dev/zero"], "pipe or device"),
  "random numbers as tokenizer": (["--tokenizer=/dev/urandom"], "pipe or device"),
  "a pipe as tokenizer": (["--tokenizer=pipe"], "pipe or device"),
  "nothing as tokenizer": (["--tokenizer="], "no tokenizer in"),
  "this folder as tokenizer": (["--tokenizer=."], "no tokenizer in"),
  "a missing tokenizer": (["--tokenizer=none.json"], "neither bytes"),
  "a tokenizer's name of 5,000 letters": (["--tokenizer=" + "x" * 5000], "neither bytes"),
  "a tokenizer that is no utf-8": (["--tokenizer=\udcff"], "is not UTF-8"),
  "text as tokenizer.json": (["--tokenizer=bad.json"], "tokenizer.json"),
  "text as a model": (["--tokenizer=bad.model"], "not a SentencePiece model"),
  "a size of nothing": (["--tokenizer=sentencepiece:0"], "no vocabulary size"),
  "a size with letters": (["--tokenizer=sentencepiece:1e3"], "no vocabulary size"),
  "a size of 10^20": (["--tokenizer=sentencepiece:" + "1" + "0" * 20], "no vocabulary size"),
  "an unknown model type": (["--tokenizer=sentencepiece:300:word"], "model type 'word'"),
  "a symbol that is empty": (["--tokenizer=sentencepiece:300", "--symbol="], "is empty"),
  "a symbol for bytes": (["--symbol=x"], "leave them out"),
  "an unknown encoding": (["--encoding=utf9"], "no such encoding"),
  "an encoding of bytes": (["--encoding=base64"], "no such encoding"),
  "an encoding of 5,000 letters": (["--encoding=" + "x" * 5000], "no such encoding"),
  "another encoding": (["--encoding=latin1"], None),
  "utf-8 by another name": (["--encoding=U8"], None),
  "a delimiter without a csv file": (["--delimiter=;"], "no input is a .csv file"),
  "no delimiter": (["--delimiter=", "--format=csv"], "one character"),
  "a quote as delimiter": (['--delimiter="', "--format=csv"], "one character"),
  "half a character as delimiter": (["--delimiter=\udcff", "--format=csv"], "is not UTF-8"),
  "an unknown format": (["--format=xls"], "choose one of"),
  "a format that it is not": (["--format=parquet"], "no document|pip install"),
  "a kind that it is not": (["--kind=chat"], "no document"),
  "a field that does not exist": (["--field=body=text"], "does not exist"),
  "a field without a column": (["--field=text"], "of the form KEY=VALUE"),
  "a field with an empty column": (["--field=text="], "no document"),
  "an exclude that matches all": (["--exclude=*"], "no file to read"),
  "an exclude that matches nothing": (["--exclude=[z-a"], "matches no file"),
  "shares above one": (["--validation=0.6", "--test=0.5"], "leave nothing"),
  "a share that is no number": (["--validation=nan"], "must be"),
  "a share below zero": (["--test=-0.1"], "must be"),
  "an infinite share": (["--test=inf"], "must be"),
  "no errors allowed": (["bad.jsonl", "--max-errors=0"], "broken records"),
  "a record of one byte": (["--max-record-bytes=1"], "must be at least 1024"),
  "no bytes in a task": (["--task-bytes=0"], "must be at least 1"),
  "one byte in a task": (["--task-bytes=1"], None),
  "a shard of one token": (["--shard-tokens=1"], None),
  "no examples": (["bad.jsonl", "--examples=0"], None),
  "a negative number of examples": (["--examples=-1"], "must be at least 0"),
  "cut at one character": (["--cut-chars=1"], None),
  "cut a conversation": (["--kind=chat", "--cut-chars=5"], "cut_chars=5 is for kind=text"),
  "a template for text": (["--template=simple"], "leave it out"),
  "an unknown cleaning step": (["--clean=soap"], "soap"),
  "an unknown setting of a step": (["--clean=length:most=3"], "most"),
  "an unknown kind of duplicates": (["--dedup=exactly"], "did you mean 'exact'"),
  "decontaminate from nothing": (["--decontaminate=none.jsonl"], "no such file"),
  "decontaminate from a device": (["--decontaminate=/dev/zero"], "pipe or device"),
  "decontaminate from other columns": (["--decontaminate=other.jsonl"], "no text could be read"),
  "decontaminate from broken records": (["--decontaminate=bad.jsonl"], "no text could be read"),
  "options without decontaminate": (["--decontaminate-options=words=3"], "needs decontaminate"),
  "words that are no number": (
    ["--decontaminate=in.jsonl", "--decontaminate-options=words=many"],
    "many",
  ),
  "held-out without any": (["--decontaminate=held-out", "--validation=0", "--test=0"], "held out"),
  "all unknown": (["--max-unknown=2"], "must be"),
  "an unknown executor": (["--executor=cloud"], "choose|invalid"),
  "an option of no executor": (["--executor-option=x=1"], "x"),
  "a file that does not exist": (["none.jsonl"], "no such file"),
  "an empty path": ([""], "path '' is empty"),
  "a pattern without a match": (["*.none"], "matches no file"),
  "a device as input": (["/dev/zero"], "pipe or device"),
  "a pipe as input": (["pipe"], "pipe or device"),
  "standard input twice": (["-", "-"], "read once"),
  "an input that is no utf-8": (["caf\udce9.txt"], "no such file"),
  "a newline in a path": (["a\nb"], "no such file"),
  "an input of 5,000 letters": (["x" * 5000], "can't be read"),
  "an unknown option": (["--outt=x"], "--out"),
  "an option of another command": (["--config.train.steps=3"], "unknown argument"),
}
# name: (environment, standard input or None if it is closed, arguments, words of the message)
ENVIRONMENTS = {
  "an empty standard input": ({}, b"", ["-"], "is empty"),
  "a closed standard input": ({}, None, ["-"], "is closed"),
  "standard input": ({}, b'{"text": "from a pipe"}\n', ["-", *ALL], None),
  "zeros in standard input": ({}, bytes(99), ["-"], "no document"),
  "threads without a number": ({"JAXGPT_THREADS": "all"}, b"", [TRAINED], "JAXGPT_THREADS=all"),
  "no threads": ({"JAXGPT_THREADS": "0"}, b"", [], None),
  "no home": ({"HOME": "/nonexistent"}, b"", [], None),
  "no place for temporary files": ({"TMPDIR": "/nonexistent"}, b"", [], None),
  "a narrow terminal": ({"COLUMNS": "1", "TERM": "dumb"}, b"", [], None),
  "a language that is not there": ({"LC_ALL": "xx_YY", "LANG": "xx_YY"}, b"", [], None),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  rows = "".join(json.dumps({"text": f"text {i} of a few words"}) + "\n" for i in range(40))
  (tmp_path / "in.jsonl").write_text(rows)
  (tmp_path / "other.jsonl").write_text('{"question": "x"}\n')
  (tmp_path / "bad.jsonl").write_text("x\n" * 3)
  (tmp_path / "bad.json").write_text("x")
  (tmp_path / "bad.model").write_text("x")
  os.mkfifo(tmp_path / "pipe")
  return tmp_path


def run(capsys, given):
  """(exit code, stdout, stderr) of `jaxgpt data`, with the usual arguments that are not given."""
  usual = [f"{k}={v}" for k, v in OPTIONS.items() if not any(x.startswith(f"{k}=") for x in given)]
  inputs = [] if any(not x.startswith("--") and x != "bad.jsonl" for x in given) else ["in.jsonl"]
  try:
    code = main.main(["data", *inputs, *given, *usual])
  except SystemExit as e:  # argparse
    code = e.code
  return code, *capsys.readouterr()


def check(code, out, err, message):
  assert "Traceback" not in err and "\x1b" not in out + err
  if message is None:
    assert code == 0, err
    assert "wrote " in out
    return
  assert code == 2, out + err
  last = err.strip().splitlines()[-1]
  assert "error: " in last and any(word in last for word in message.split("|")), err
  if "usage: " not in err:
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(place, capsys, name):
  given, message = ARGUMENTS[name]
  before = set(os.listdir(place))
  check(*run(capsys, given), message)
  assert not [x for x in set(os.listdir(place)) - before if message and x == "out"]


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments(place, capsys, monkeypatch, name):
  variables, data, given, message = ENVIRONMENTS[name]
  for key, value in variables.items():
    monkeypatch.setenv(key, value)
  stdin = None if data is None else io.TextIOWrapper(io.BytesIO(data))
  monkeypatch.setattr(sys, "stdin", stdin)
  check(*run(capsys, given), message)


def test_a_working_directory_that_is_gone(place, capsys, monkeypatch):
  (place / "gone").mkdir()
  monkeypatch.chdir(place / "gone")
  (place / "gone").rmdir()
  check(*run(capsys, [str(place / "in.jsonl")]), "the working directory is gone")


def test_there_are_many():
  assert len(ARGUMENTS) + len(ENVIRONMENTS) >= 90
