"""Texts that a tokenizer cannot write: unknown tokens, and failures of its library."""

import base64
import json

import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.text.prepare import prepare
from jaxgpt.text.tokenizers import base, tokenizer

GOOD = [f"word {i} of a text" for i in range(30)]
PATTERN = r"\p{L}+| ?[^\s\p{L}]+|\s+(?!\S)|\s+"


def corpus(path, texts):
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return path


def word_level(folder, words, unk="[UNK]"):
  """A Hugging Face tokenizer of whole words."""
  tokenizers = pytest.importorskip("tokenizers")
  vocab = {word: i for i, word in enumerate(["[CLS]", "[SEP]", *([unk] if unk else []), *words])}
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=unk or "none"))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  inner.add_special_tokens(["[CLS]", "[SEP]", *([unk] if unk else [])])
  folder.mkdir()
  inner.save(str(folder / "tokenizer.json"))
  return folder


def tiktoken_files(folder):
  pytest.importorskip("tiktoken")
  ranks = {bytes([b]): b for b in range(256)}
  ranks |= {b" " * n: 255 + i for i, n in enumerate((2, 4, 8), 1)}
  folder.mkdir()
  lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
  (folder / "v.tiktoken").write_bytes(b"".join(lines))
  settings = {"pattern": PATTERN, "special_tokens": {"<|endoftext|>": 300}}
  (folder / "tiktoken.json").write_text(json.dumps(settings))
  return folder / "v.tiktoken"


def run(tmp_path, texts, spec, **options):
  lines = []
  manifest = prepare.prepare(
    [corpus(tmp_path / "in.jsonl", texts)],
    tmp_path / "out",
    tokenizer=str(spec),
    report=lines.append,
    **({"validation": 0, "test": 0, "cut_chars": 0} | options),
  )
  return manifest, lines


def test_unknown_tokens_are_counted_and_a_large_share_is_a_warning(tmp_path):
  folder = word_level(tmp_path / "t", ["word", "of", "a"])
  manifest, lines = run(tmp_path, GOOD, folder)
  assert manifest["unknown_tokens"] == 60 and manifest["total"]["tokens"] == 210
  (line,) = [line for line in lines if "unknown" in line]
  assert line.startswith("warning: 60 of 210 tokens (28.6%) are the unknown token")
  card = json.loads((tmp_path / "out" / "card.json").read_text())
  assert card["unknown tokens"] == 60
  assert "60 of 210 tokens (28.6%) are unknown" in (tmp_path / "out" / "card.md").read_text()


def test_too_large_a_share_of_unknown_tokens_ends_the_run(tmp_path):
  folder = word_level(tmp_path / "t", ["word", "of", "a"])
  with pytest.raises(UserError, match=r"max_unknown=0.2: 60 of 210 tokens \(28.6%\)"):
    run(tmp_path, GOOD, folder, max_unknown=0.2)
  assert run(tmp_path, GOOD, folder, max_unknown=0.3)[0]["kept"] == 30


def test_no_unknown_token_is_not_mentioned(tmp_path):
  manifest, lines = run(tmp_path, GOOD, "sentencepiece:300")
  assert "unknown_tokens" not in manifest and not any("unknown" in line for line in lines)


def test_a_text_that_the_library_refuses_is_dropped_and_named(tmp_path):
  folder = word_level(tmp_path / "t", {word for text in GOOD for word in text.split()}, unk="")
  manifest, lines = run(tmp_path, [*GOOD, "another", *GOOD, "one more"], folder)
  assert manifest["dropped"] == {"tokenizer": 2} and manifest["kept"] == 60
  assert any("in.jsonl:31: the tokenizers library fails on a text" in line for line in lines)


def test_a_panic_in_rust_is_an_error_of_the_text():
  class PanicException(BaseException):
    pass

  with pytest.raises(base.EncodingError, match="overflow"), base.failures_told("failed"):
    raise PanicException("overflow")
  with pytest.raises(KeyboardInterrupt), base.failures_told("failed"):
    raise KeyboardInterrupt


def test_tiktoken_encodes_long_runs_of_spaces_exactly(tmp_path, monkeypatch):
  t = tokenizer.load(tiktoken_files(tmp_path / "t"))
  texts = ["short", "a" + " " * 50_001 + "b \n\n c", "x" + " \n\t" * 20_000]
  expected = t._inner.encode_ordinary_batch(texts)
  calls, encode = [], t._encode_in_words
  monkeypatch.setattr(t, "_encode_in_words", lambda text: calls.append(len(text)) or encode(text))
  assert [ids.tolist() for ids in t.encode_batch(texts)] == expected
  assert calls == [len(texts[1]), len(texts[2])]


def test_a_million_spaces_do_not_end_the_run(tmp_path):
  long = "a" + " " * 1_100_000 + "b"
  path = tiktoken_files(tmp_path / "t")
  manifest, _ = run(tmp_path, [*GOOD, long], path)
  assert manifest["kept"] == 31 and not manifest["dropped"]
  assert manifest["total"]["tokens"] > 1_100_000 / 8
  t = tokenizer.load(path)
  ids = t.encode_batch([long])[0]
  assert t.decode(ids) == long and np.all(ids[1:137_000] == 258)


@pytest.mark.parametrize(
  "name, content",
  [
    ("v.tiktoken", base64.b64encode(b"a") + b" 1\n"),  # not every byte
    ("tiktoken.json", b'{"pattern": "(", "special_tokens": {"</s>": 300}}'),
    ("tiktoken.json", b'{"pattern": "a", "special_tokens": {"</s>": 3}}'),  # an id twice
    ("tiktoken.json", b'{"pattern": 3, "special_tokens": [1]}'),
    ("tiktoken.json", b"\xff"),
  ],
)
def test_vocabularies_that_tiktoken_cannot_hold_are_refused(tmp_path, name, content):
  path = tiktoken_files(tmp_path / "t")
  (path.parent / name).write_bytes(content)
  with pytest.raises(UserError, match=r"tiktoken"):
    tokenizer.load(path)


@pytest.mark.parametrize("name", ["", "tokenizer.json", "tokenizer.model", "jaxgpt_tokenizer.json"])
def test_devices_are_not_read(tmp_path, name):
  path = tmp_path / "t" / name
  if name:
    path.parent.mkdir()
  path.symlink_to("/dev/zero")
  with pytest.raises(UserError, match="is a pipe or device"):
    tokenizer.from_spec(str(tmp_path / "t"), list)
