"""What each cleaning step changes and drops, and that nothing but the text decides it."""

import contextlib
import pickle
import struct
import sys
import time

import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.text.filters import clean, clean_steps, datatrove_blocks, words
from jaxgpt.text.readers import documents as documents_lib

PROSE = (
  "The committee met on Tuesday to discuss the plan that it had been given. Nobody was "
  'happy with the first draft, and so they sent it back to the authors. "We have to be '
  'quick," said the chair. It took the better part of the year to write a second one. '
  "When it came, the members of the committee agreed that it was better than the first."
)
DATATROVE = {
  "ftfy",
  "html",
  "pii",
  "c4_lines",
  "c4_quality",
  "gopher_quality",
  "gopher_repetition",
  "fineweb_quality",
  "language",
}


def run(specs, texts):
  """Kept texts, counts of what was dropped, and changes."""
  dropped = documents_lib.Dropped()
  cleaner = clean.make(specs)
  documents = [documents_lib.Document(f"s:{i}", text) for i, text in enumerate(texts)]
  kept = [d.text for d in cleaner(documents, dropped)]
  assert len(kept) + sum(dropped.counts.values()) == len(texts), "the account adds up"
  return kept, dropped.counts, cleaner.changed


def test_without_steps_documents_pass():
  assert run([], ["a", " b "]) == (["a", " b "], {}, {})


def test_steps_without_datatrove():
  texts = ["e\u0301 " * 10, "short", "long " * 100]
  kept, dropped, changed = run(["unicode", "length:min_chars=10,max_words=50"], texts)
  assert kept == ["\u00e9 " * 10]
  assert dropped == {"length: too few characters": 1, "length: too many words": 1}
  assert changed == {"unicode": [1, 10]}


def test_steps_run_in_the_order_given():
  text = "\ufb01" * 10  # a ligature that NFKC writes as two letters
  assert run(["unicode:form=NFKC", "length:min_chars=15"], [text])[0] == ["fi" * 10]
  assert run(["length:min_chars=15", "unicode:form=NFKC"], [text])[0] == []


def test_repeated_lines_stay_once_where_they_are_long_enough():
  line = "Copyright of the authors, all rights reserved.\n"
  text = f"{line}one\n{line}}}\n}}\n  {line}end"
  kept, _, changed = run(["repeated_lines"], [text])
  assert kept == [f"{line}one\n}}\n}}\nend"]
  assert changed == {"repeated_lines": [1, 2 * len(line) + 2]}


def test_what_is_left_without_text_is_dropped():
  pytest.importorskip("datatrove")
  assert run(["c4_lines"], ["Home | About | Contact"])[1] == {"c4_lines: empty": 1}


@pytest.mark.parametrize(
  "spec, text, want",
  [
    ("ftfy", "caf\u00c3\u00a9 \u00e2\u20ac\u201d ok", "caf\u00e9 \u2014 ok"),
    (
      "pii",
      "to bob@site.org from 8.8.4.4, 10.0.0.1",
      "to email@example.com from 22.214.171.124, 10.0.0.1",
    ),
    (
      "pii:remove_ips=false,email_replacement=<mail>",
      "to bob@site.org from 8.8.4.4",
      "to <mail> from 8.8.4.4",
    ),
    (
      "c4_lines",
      "Menu\nThis line has an end.\nYou must enable javascript now.\nSo has this one.",
      "This line has an end.\nSo has this one.",
    ),
    (
      "html:pages_only=false",
      f"<html><body><nav><a href='/'>Home</a></nav><p>{PROSE}</p></body></html>",
      PROSE,
    ),
  ],
)
def test_what_is_rewritten(spec, text, want):
  pytest.importorskip("datatrove")
  kept, _, changed = run([spec], [text])
  assert kept == [want]
  assert changed == {spec.split(":")[0]: [1, len(text) - len(want)]}


@pytest.mark.parametrize(
  "spec, text, rule",
  [
    ("gopher_quality", "too short", "gopher_quality: gopher_short_doc"),
    ("gopher_quality:min_stop_words=0", "zxcv bnmq " * 60, None),
    ("gopher_quality", "zxcv bnmq " * 60, "gopher_quality: gopher_enough_stop_words"),
    ("gopher_repetition", "the same line again\n" * 40, "gopher_repetition: dup_line_frac"),
    ("fineweb_quality", "no stop\n" * 40, "fineweb_quality: line_punct_ratio"),
    ("c4_quality", f"{PROSE}\nif (x) {{ return to the start. }}.", "c4_quality: curly_bracket"),
    ("c4_quality", "Just one sentence is here.", "c4_quality: too_few_sentences"),
    ("html:pages_only=false", "<html><body></body></html>", "html: no text found"),
  ],
)
def test_what_is_dropped_and_that_good_prose_is_not(spec, text, rule):
  pytest.importorskip("datatrove")
  kept, dropped, _ = run([spec], [text])
  assert dropped == ({rule: 1} if rule else {}) and len(kept) == (rule is None)
  if not spec.startswith("html"):
    assert len(run([spec], [PROSE])[0]) == 1


def test_html_pages_among_other_texts():
  pytest.importorskip("trafilatura")
  text = f"<html><body><p>{PROSE}</p></body></html>"
  cleaner, dropped = clean.make(["html"]), documents_lib.Dropped()
  documents = [documents_lib.Document("a", text, html=True), documents_lib.Document("b", text)]
  assert list(cleaner(documents, dropped)) == [documents_lib.Document("a", PROSE), documents[1]]


def test_fields_of_labelled_documents_are_rewritten_but_labels_and_roles():
  lig = "\ufb01"
  fields = {"messages": [{"role": lig, "content": lig}], "label": lig, "text": lig, "n": 3}
  document = documents_lib.Document("a", lig * 5, "", fields)
  steps = ["unicode:form=NFKC", "length:min_chars=10"]
  (cleaned,) = clean.make(steps)([document], documents_lib.Dropped())
  assert cleaned.text == "fi" * 5
  assert cleaned.fields == {
    "messages": [{"role": lig, "content": "fi"}],
    "label": lig,
    "text": "fi",
    "n": 3,
  }


def test_a_field_without_text_after_cleaning_drops_the_document():
  turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "gone"}]
  fields = [
    {"input": "a question", "target": "gone"},
    {"query": "gone", "positive": "an answer"},
    {"messages": turns},
    {"input": "gone", "target": "an answer"},  # an input may be empty
    {"messages": [*turns[:1], turns[1] | {"weight": 0}]},
  ]
  documents = [
    documents_lib.Document(f"s:{i}", "a question\ngone", "", one) for i, one in enumerate(fields)
  ]
  steps = clean.make(["unicode"])
  steps._steps[0] = steps._steps[0]._replace(run=lambda text: (text.replace("gone", " "), None))
  dropped = documents_lib.Dropped()
  assert [d.source for d in steps(documents, dropped)] == ["s:3", "s:4"]
  assert dropped.counts == {"unicode: empty": 3}


def test_order_and_neighbours_do_not_matter():
  """datatrove's own blocks go on from one text to the next (PII's replacements, for one)."""
  pytest.importorskip("datatrove")
  specs = ["pii:email_replacement=a@x.org;b@x.org;c@x.org", "gopher_repetition", "repeated_lines"]
  texts = [f"{PROSE} Write to m{i}@site.org or n@site.org. {i}" for i in range(5)]
  together = run(specs, texts)[0]
  assert together == [run(specs, [text])[0][0] for text in texts]
  assert together == run(specs, texts[::-1])[0][::-1]
  assert "a@x.org or b@x.org" in together[1]


def add_step(monkeypatch, name, build):
  """Registers a cleaning step for one test."""
  monkeypatch.setattr(clean_steps.STEPS, "_entries", dict(clean_steps.STEPS))
  clean_steps.STEPS.add(name, clean_steps.CleaningStep(build, {}, "a test's step"))


def test_a_step_that_fails_drops_its_document_only(monkeypatch):
  def fail(text):
    if "bad" in text:
      raise KeyError("oops")
    return text.upper(), None

  add_step(monkeypatch, "shout", lambda spec: fail)
  kept, dropped, _ = run(["shout"], ["good", "bad", "fine"])
  assert kept == ["GOOD", "FINE"] and dropped == {"shout: error": 1}


def test_a_text_without_utf8_form_is_dropped(monkeypatch):
  add_step(monkeypatch, "break", lambda spec: lambda text: ("\ud800", None))
  assert run(["break"], ["x"])[1] == {"break: error": 1}


def test_time_is_up_for_an_extraction_that_does_not_end(monkeypatch):
  pytest.importorskip("trafilatura")
  block = datatrove_blocks.module("pipeline.extractors.trafilatura").Trafilatura

  def extract(self, text):
    end = time.monotonic() + 5
    while "forever" in text and time.monotonic() < end:
      with contextlib.suppress(Exception):  # as trafilatura would
        sum(range(1000))
    return text

  monkeypatch.setattr(block, "extract", extract)
  kept, dropped, _ = run(["html:pages_only=false,timeout=0.1"], ["forever", "fine"])
  assert kept == ["fine"] and dropped == {"html: timeout": 1}


def test_the_cleaner_pickles():
  pytest.importorskip("datatrove")
  cleaner = pickle.loads(pickle.dumps(clean.make(["gopher_quality:min_doc_words=5", "unicode"])))
  dropped = documents_lib.Dropped()
  assert list(
    cleaner([documents_lib.Document("a", PROSE), documents_lib.Document("b", "no")], dropped)
  ) == [documents_lib.Document("a", PROSE)]
  assert dropped.examples == {"gopher_quality: gopher_short_doc": ["b: 'no'"]}


def fasttext_model(words_of_labels):
  """The bytes of a fastText classifier (format 12) that knows some words of each label."""
  labels = list(words_of_labels)
  entries = [(word, i) for i, label in enumerate(labels) for word in words_of_labels[label]]
  dim = len(labels)
  out = struct.pack("<2i", 793712314, 12)
  # dim, window, epochs, least count, negatives, word n-grams, softmax, supervised, no buckets, …
  out += struct.pack("<12id", dim, 5, 1, 1, 5, 1, 3, 3, 0, 0, 0, 100, 1e-4)
  out += struct.pack("<3i2q", len(entries) + dim, len(entries), dim, 100, -1)
  for name, kind in [(word, 0) for word, _ in entries] + [(f"__label__{n}", 1) for n in labels]:
    out += name.encode() + b"\0" + struct.pack("<qb", 9, kind)
  rows = np.eye(dim, dtype="<f4")
  for matrix in (20 * rows[[i for _, i in entries]], rows):
    out += b"\0" + struct.pack("<2q", *matrix.shape) + matrix.tobytes()
  return out


def test_language_by_a_model_of_the_user(tmp_path):
  pytest.importorskip("fasttext")
  pytest.importorskip("datatrove")
  model = tmp_path / "lid.bin"
  model.write_bytes(fasttext_model({"en": ["</s>", "the", "of"], "de": ["der", "und"]}))
  texts = ["the end of\nthe line", "der Anfang und\nder Schluss", "the und der of"]
  kept, dropped, _ = run([f"language:model={model},keep=de;fr"], texts)
  assert kept == texts[1:2] and dropped == {"language: en": 2}
  assert len(run([f"language:model={model},keep=de,threshold=0.001"], texts)[0]) == 2
  model.write_bytes(b"junk")
  with pytest.raises(UserError, match="is no fastText model"):
    clean.make([f"language:model={model},keep=de"])


@pytest.mark.parametrize(
  "spec, message",
  [
    ("ftfi", "did you mean 'ftfy'"),
    ("length:min_char=3", "did you mean 'min_chars'"),
    ("length:min_chars=many", "'many' is no int"),
    ("length:min_chars", "give min_chars a value"),
    ("unicode:form=UTF8", "choose one of NFC"),
    ("", "choose one of"),
    ("language:model=/none.bin,keep=en", "is no file"),
  ],
)
def test_bad_specs_are_named(spec, message):
  with pytest.raises(UserError, match=message) as e:
    clean.make(["length", spec])
  assert f"--clean={spec}" in str(e.value)


@pytest.mark.parametrize("name", sorted(DATATROVE - {"language"}))
def test_without_the_extra_a_step_says_what_to_install(name, monkeypatch):
  for module in [m for m in sys.modules if m.split(".")[0] == "datatrove"]:
    monkeypatch.delitem(sys.modules, module)
  for module in ("datatrove", "ftfy", "trafilatura", "loguru"):
    monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(UserError, match=r"pip install 'jaxgpt\[data\]'"):
    clean.make([name])
  clean.make(sorted(set(clean_steps.STEPS) - DATATROVE))


def test_words_and_sentences():
  assert words.words("Don't stop (e.g. at a-b, x_1=3.14)... ===\n") == [
    "Don't",
    "stop",
    "(",
    "e.g",
    ".",
    "at",
    "a-b",
    ",",
    "x_1=3.14",
    ")",
    "...",
    "===",
  ]
  assert words.words("漢字 ไทย नमस्ते हिन्दी।") == ["漢", "字", "ไ", "ท", "ย", "नमस्ते", "हिन्दी", "।"]
  assert words.plain_words("A b_c, 1.5! Don't") == ["a", "b", "c", "1", "5", "don't"]
  text = 'One here. "Two?" Three, e.g. this one\nfour。五'
  assert [text[a:b] for a, b in words.sentence_spans(text)] == [
    "One here.",
    '"Two?"',
    "Three, e.g. this one",
    "four。",
    "五",
  ]
