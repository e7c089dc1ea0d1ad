"""Content of a prepared folder; an unfinished one is never mistaken for it."""

import itertools
import json
import os

import numpy as np
import pytest

from jaxgpt.data import source
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import jobs, prepare, shards
from jaxgpt.text.prepare.tasks import reading
from jaxgpt.text.tokenizers import tokenizer

DOCUMENTS = [f"Document {i}.\n" + f"word{i % 7} " * (i % 40) for i in range(300)]


@pytest.fixture
def corpus(tmp_path):
  path = tmp_path / "in" / "corpus.jsonl"
  path.parent.mkdir()
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
  return path.parent


def contents(folder, split):
  """{text: split} as the shards tell it."""
  t, s = tokenizer.load(folder), source.open_split(folder, split)
  docs = [s.read(i, 0, int(n) + 1) for i, n in enumerate(s.lengths)]
  assert all(d[0] == t.bos_id and d[-1] == t.eos_id for d in docs)
  return [t.decode(d) for d in docs]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece:300"])
def test_every_document_is_in_one_split_as_it_was(corpus, tmp_path, kind):
  manifest = prepare.prepare([corpus], tmp_path / "out", tokenizer=kind, validation=0.2, test=0.1)
  texts = {split: contents(tmp_path / "out", split) for split in shards.SPLITS}
  assert sorted(itertools.chain(*texts.values())) == sorted(DOCUMENTS)
  assert 30 < len(texts["validation"]) < 90 and 10 < len(texts["test"]) < 60
  for split, got in texts.items():
    assert manifest["splits"][split]["documents"] == len(got)
    assert manifest["splits"][split]["bytes"] == sum(len(t.encode()) for t in got)
  assert manifest["total"]["bytes"] == sum(len(t.encode()) for t in DOCUMENTS)
  assert manifest == shards.read_manifest(tmp_path / "out")


def test_equal_texts_share_a_split_and_stay_there_when_the_corpus_grows(corpus, tmp_path):
  first = prepare.prepare([corpus], tmp_path / "a", tokenizer="bytes", validation=0.3)
  (corpus / "copy.jsonl").write_text((corpus / "corpus.jsonl").read_text())
  (corpus / "more.txt").write_text("something else")
  prepare.prepare([corpus], tmp_path / "b", tokenizer="bytes", validation=0.3)
  for split in shards.SPLITS:
    once = contents(tmp_path / "a", split)
    again = [t for t in contents(tmp_path / "b", split) if t != "something else"]
    assert sorted(again) == sorted(once * 2)
  salted = prepare.prepare([corpus], tmp_path / "c", tokenizer="bytes", validation=0.3, salt="x")
  assert salted["splits"]["validation"] != first["splits"]["validation"]


def test_the_digest_is_a_function_of_the_inputs(corpus, tmp_path):
  os.rename(corpus, tmp_path / "elsewhere")
  (tmp_path / "x").mkdir()
  options = {"tokenizer": "sentencepiece:300", "shard_tokens": 500}
  a = prepare.prepare([tmp_path / "elsewhere"], tmp_path / "a", **options)
  os.rename(tmp_path / "elsewhere", tmp_path / "x" / "elsewhere")
  b = prepare.prepare([tmp_path / "x" / "elsewhere"], tmp_path / "b", **options)
  assert len(a["splits"]["train"]["shards"]) > 3
  assert a["digest"] == b["digest"]
  assert str(tmp_path) not in (tmp_path / "b" / "manifest.json").read_text()
  c = prepare.prepare([tmp_path / "x"], tmp_path / "c", salt="other", **options)
  assert c["digest"] != a["digest"]


def test_shards_are_named_by_their_number_and_match_their_digests(corpus, tmp_path):
  manifest = prepare.prepare([corpus], tmp_path / "out", tokenizer="bytes", shard_tokens=4000)
  entry = manifest["splits"]["train"]
  count = len(entry["shards"])
  assert count > 2
  for i, shard in enumerate(entry["shards"]):
    assert shard["name"] == f"train-{i:05d}-of-{count:05d}.arrayrecord"
    assert (tmp_path / "out" / shard["name"]).stat().st_size == shard["size"]
  assert sum(s["tokens"] for s in entry["shards"]) == entry["tokens"]
  assert not list((tmp_path / "out").glob("*.unfinished"))


def not_again(*args):
  raise AssertionError("a finished task is done again")


@pytest.mark.parametrize("where", ["write_manifest", "make_manifest"])
def test_a_crash_leaves_nothing_that_looks_finished_and_a_rerun_goes_on(
  corpus, tmp_path, monkeypatch, where
):
  with monkeypatch.context() as m:

    def crash(*args, **kwargs):
      raise KeyboardInterrupt

    m.setattr(shards, where, crash)
    with pytest.raises(KeyboardInterrupt):
      prepare.prepare([corpus], tmp_path / "out", tokenizer="bytes")
  assert not (tmp_path / "out").exists()
  with pytest.raises(UserError, match="not a prepared data folder"):
    source.open_split(tmp_path / "out.unfinished", "train")
  lines = []
  with monkeypatch.context() as m:
    m.setattr(reading, "read_and_clean", not_again)
    prepare.prepare([corpus], tmp_path / "out", tokenizer="bytes", report=lines.append)
  assert any("continuing the unfinished run" in line for line in lines)
  assert contents(tmp_path / "out", "train")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_an_error_in_a_late_stage_keeps_the_early_ones(corpus, tmp_path, monkeypatch):
  lines = []
  with pytest.raises(UserError, match="at most"):
    prepare.prepare(
      [corpus], tmp_path / "out", tokenizer="sentencepiece:60000", report=lines.append
    )
  assert any("out.unfinished" in line for line in lines)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out.unfinished"]
  monkeypatch.setattr(reading, "read_and_clean", not_again)
  prepare.prepare([corpus], tmp_path / "out", tokenizer="bytes", report=lines.append)
  assert any(line.startswith("tokenizer: ") and "starting over" in line for line in lines)
  assert contents(tmp_path / "out", "train")


def test_changed_inputs_and_options_start_anew(corpus, tmp_path, monkeypatch):
  with pytest.raises(UserError, match="at most"):
    prepare.prepare([corpus], tmp_path / "out", tokenizer="sentencepiece:60000")
  (corpus / "more.txt").write_text("something else")
  lines = []
  prepare.prepare([corpus], tmp_path / "out", tokenizer="bytes", report=lines.append)
  assert any(line.startswith("read: ") and "starting over" in line for line in lines)
  assert "something else" in [t for s in shards.SPLITS for t in contents(tmp_path / "out", s)]


@pytest.mark.parametrize(
  "changed", [{"train_on": "last"}, {"template_variables": (("shout", True),)}]
)
def test_other_options_of_the_template_tokenize_again(tmp_path, monkeypatch, changed):
  pytest.importorskip("jinja2")
  said = "{{ m.content | upper if shout else m.content }}</s>"
  template = "{% for m in messages %}" + said + "{% endfor %}"
  monkeypatch.setattr(tokenizer.ByteTokenizer, "chat_template", template)
  turns = [("user", "Hi"), ("assistant", "Yo"), ("user", "And?"), ("assistant", "Bye")]
  row = {"messages": [{"role": role, "content": text} for role, text in turns]}
  (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
  options = {"kind": "chat", "tokenizer": "bytes", "validation": 0, "test": 0}

  def interrupt(*args, **kwargs):
    raise KeyboardInterrupt

  with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
    m.setattr(shards, "make_manifest", interrupt)
    prepare.prepare(tmp_path / "in.jsonl", tmp_path / "out", **options)
  digests = [
    prepare.prepare(tmp_path / "in.jsonl", tmp_path / out, **options, **changed)["digest"]
    for out in ("out", "fresh")
  ]
  assert digests[0] == digests[1]


def test_two_runs_at_once(corpus, tmp_path):
  with (
    jobs.Work(tmp_path / "out.unfinished", {}),
    pytest.raises(UserError, match="another run is at work"),
  ):
    prepare.prepare([corpus], tmp_path / "out", tokenizer="bytes")
  prepare.prepare([corpus], tmp_path / "out", tokenizer="bytes")


def test_a_folder_that_is_in_the_way_of_the_work_is_not_touched(corpus, tmp_path):
  (tmp_path / "out.unfinished").mkdir()
  (tmp_path / "out.unfinished" / "novel.tex").write_text("years of work")
  with pytest.raises(UserError, match="in the way"):
    prepare.prepare([corpus], tmp_path / "out", tokenizer="bytes")
  assert (tmp_path / "out.unfinished" / "novel.tex").read_text() == "years of work"


def test_a_finished_folder_is_only_replaced_when_asked(corpus, tmp_path):
  out = tmp_path / "out"
  before = prepare.prepare([corpus], out, tokenizer="bytes")
  with pytest.raises(UserError, match="--overwrite"):
    prepare.prepare([corpus], out, tokenizer="bytes", salt="2")
  assert shards.read_manifest(out) == before
  after = prepare.prepare([corpus], out, tokenizer="bytes", salt="2", overwrite=True)
  assert shards.read_manifest(out) == after != before
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_folder_of_something_else_is_never_touched(corpus, tmp_path):
  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
  with pytest.raises(UserError, match="not a prepared data folder"):
    prepare.prepare([corpus], tmp_path / "thesis", tokenizer="bytes", overwrite=True)
  assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
  (tmp_path / "empty").mkdir()
  prepare.prepare([corpus], tmp_path / "empty", tokenizer="bytes")


def test_the_tokenizer_of_another_folder_is_taken_over(corpus, tmp_path):
  first = prepare.prepare([corpus], tmp_path / "a", tokenizer="sentencepiece:300")
  second = prepare.prepare([corpus], tmp_path / "b", tokenizer=str(tmp_path / "a"), salt="s")
  assert second["tokenizer"] == first["tokenizer"]


def test_the_tokenizer_learns_from_training_documents_only(corpus, tmp_path, monkeypatch):
  seen = []
  train = tokenizer.train_sentencepiece
  monkeypatch.setattr(
    tokenizer, "train_sentencepiece", lambda texts, **kw: seen.extend(texts) or train(texts, **kw)
  )
  prepare.prepare(
    [corpus], tmp_path / "out", tokenizer="sentencepiece:300", validation=0.3, sample_bytes=10_000
  )
  assert set(seen) < set(contents(tmp_path / "out", "train"))
  assert 10_000 <= sum(map(len, seen)) < 11_000
  assert seen != [t for t in DOCUMENTS if t in set(seen)], "drawn by hash, not in file order"


def test_one_long_text_is_cut_into_all_splits(tmp_path):
  (tmp_path / "play.txt").write_text("".join(f"Line {i} of the play.\n" for i in range(2000)))
  prepare.prepare(
    tmp_path / "play.txt", tmp_path / "out", tokenizer="bytes", cut_chars=500, validation=0.2
  )
  pieces = contents(tmp_path / "out", "train")
  assert len(pieces) > 40 and contents(tmp_path / "out", "validation")
  assert all(len(p) <= 500 and p.endswith("\n") for p in pieces)
  assert source.open_split(tmp_path / "out", "train").source_name(0).startswith("play.txt#")


@pytest.mark.parametrize(
  "options, message",
  [
    ({"validation": 1.5}, "validation=1.5"),
    ({"validation": 0.6, "test": 0.4}, "below 1"),
    ({"tokenizer": "sentencepiece"}, "names no vocabulary size"),
    ({"tokenizer": "gpt2"}, "'gpt2' is neither"),
    ({"shard_tokens": 0}, "shard_tokens=0"),
    ({"tokenizer": "sentencepiece:300:wordpiece"}, "model type 'wordpiece'"),
    ({"template": "simple"}, "template='simple' is for kind=chat and pref"),
    ({"kind": "chat", "template": "simpel"}, "no chat template 'simpel'"),
    ({"kind": "chat", "template": "chatml", "tokenizer": "bytes"}, "needs <.im_start.>"),
    ({"decontaminate": ["nowhere.jsonl"]}, "nowhere.jsonl"),
    ({"decontaminate_options": "words=5"}, "decontaminate_options='words=5'"),
    ({"decontaminate_field": "question"}, "decontaminate_field='question' needs decontaminate"),
    ({"max_record_bytes": 10**19}, "max_record_bytes=1"),
  ],
)
def test_bad_options_are_named_before_anything_is_done(corpus, tmp_path, options, message):
  with pytest.raises(UserError, match=message):
    prepare.prepare([corpus], tmp_path / "out", **options)
  assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece:300"])
def test_nothing_to_train_on(tmp_path, kind):
  (tmp_path / "a.txt").write_text("\n")
  with pytest.raises(UserError, match="no document for the training split"):
    prepare.prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=kind)
  assert not (tmp_path / "out").exists()


def test_dropped_documents_are_in_the_manifest_and_the_report(corpus, tmp_path):
  (corpus / "bad.jsonl").write_text("{\n{\n")
  lines = []
  manifest = prepare.prepare([corpus], tmp_path / "out", tokenizer="bytes", report=lines.append)
  assert manifest["dropped"] == {"invalid json": 2}
  assert any("in/bad.jsonl:2" in line for line in lines)
  (corpus / "bad.jsonl").write_text("{\n" * 30)
  for examples in (0, 1, 12):
    lines.clear()
    prepare.prepare(
      [corpus],
      tmp_path / "out",
      tokenizer="bytes",
      report=lines.append,
      overwrite=True,
      examples=examples,
    )
    assert sum("bad.jsonl:" in line for line in lines) == examples


def test_a_corpus_that_is_not_what_was_said_ends_with_the_account(corpus, tmp_path):
  lines = []
  with pytest.raises(UserError, match="no document for the training split"):
    prepare.prepare([corpus], tmp_path / "out", kind="chat", report=lines.append)
  assert any("300 by rule 'missing field'" in line for line in lines)
  assert any("corpus.jsonl:1: no 'messages' in 'text'" in line for line in lines)


def test_what_was_written_into_the_folder_that_is_read_is_not_read(corpus, tmp_path):
  first = prepare.prepare([corpus], corpus / "out", tokenizer="bytes")
  (corpus / "b.unfinished").mkdir()
  (corpus / "b.unfinished" / "state.json").write_text('{"text": "x"}')
  (corpus / "mine").mkdir()
  again = prepare.prepare([corpus], corpus / "out", tokenizer="bytes", overwrite=True)
  assert again["digest"] == first["digest"] and first["read"] == len(DOCUMENTS)
  assert "passed_over" not in first and again["passed_over"]["prepared data"]["count"] > 9
  with pytest.raises(UserError, match="folders that jaxgpt data wrote"):
    prepare.prepare([corpus / "out"], tmp_path / "b", tokenizer="bytes")
  (corpus / "mine" / "manifest.json").write_text('{"text": "a text of this name is read"}')
  more = prepare.prepare([corpus], tmp_path / "c", tokenizer="bytes")
  assert more["read"] == len(DOCUMENTS) + 1


@pytest.mark.parametrize("vocab, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_the_dtype_is_the_narrowest_that_fits(vocab, dtype):
  assert shards.token_dtype(vocab) == np.dtype(dtype)
