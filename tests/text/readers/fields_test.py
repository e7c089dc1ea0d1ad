"""Labelled records: the forms that are read, and the one message about each that cannot be used."""

import json

import pytest

from jaxgpt.text.prepare import prepare
from jaxgpt.text.readers import documents

CONTEXT = "Jim went to York."
ANSWER = {"text": "York", "answer_start": 12}


def read(tmp_path, kind, *rows):
  """(documents, account) of a JSON Lines file."""
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  dropped = documents.Dropped()
  return list(documents.documents(documents.find(path), kind=kind, dropped=dropped)), dropped


def question(answers, **others):
  return {"question": "Where?", "context": CONTEXT, "answers": answers} | others


@pytest.mark.parametrize(
  "kind, row, fields",
  [
    ("tagging", {"words": '["a", "b"]', "tags": "[0, 1]"}, {"words": ["a", "b"], "tags": [0, 1]}),
    ("multi_label", {"text": "a", "labels": "[]"}, {"text": "a", "labels": []}),
    ("multi_label", {"text": "a", "labels": ["inf"]}, {"text": "a", "labels": ["inf"]}),
    ("multi_label", {"text": "a", "labels": ["x", 1]}, {"text": "a", "labels": ["x", 1]}),
    ("question_answering", question([ANSWER]), question([ANSWER])),
    ("question_answering", question(ANSWER), question([ANSWER])),
    ("question_answering", question(json.dumps([ANSWER])), question([ANSWER])),
    ("question_answering", question({"text": ["York"], "answer_start": [12]}), question([ANSWER])),
    ("question_answering", question({"text": [], "answer_start": []}), question([])),
  ],
)
def test_forms_of_labels(tmp_path, kind, row, fields):
  (document,), _ = read(tmp_path, kind, row)
  assert document.fields == fields


def test_labels_are_no_part_of_the_text(tmp_path):
  for kind, row, text in (
    ("tagging", {"words": ["a", "b c"], "tags": ["X", "Y"]}, "a b c"),
    ("multi_label", {"text": "a", "text_pair": "b", "labels": ["X"]}, "a\nb"),
    ("question_answering", question([ANSWER]), f"Where?\n{CONTEXT}"),
    ("retrieval", {"query": "a", "positive": "b"}, "a\nb"),
  ):
    assert read(tmp_path, kind, row)[0][0].text == text


UNUSABLE = [
  ("tagging", {"words": ["a", "b"], "tags": ["O"]}, "unaligned tags", "2 words, but 1 tag"),
  ("tagging", {"words": ["a", " "], "tags": ["O", "O"]}, "unaligned tags", "word 2 of 2 has no"),
  ("tagging", {"words": ["a", 1], "tags": ["O", "O"]}, "wrong type", "words: word 2 is a int"),
  ("tagging", {"words": "a b", "tags": ["O", "O"]}, "wrong type", "words is a string, but not"),
  ("tagging", {"words": ["a"], "tags": [""]}, "wrong type", "tags holds an empty name"),
  ("tagging", {"words": ["a"], "tags": [0.5]}, "wrong type", "tags holds '0.5', neither"),
  ("tagging", {"words": ["a"], "tags": ["9" * 5000]}, "wrong type", "tags is 9999"),
  ("multi_label", {"text": "a", "labels": ["1e999"]}, "wrong type", "labels is 1e999, which"),
  ("classification", {"text": "a", "label": "-1e999"}, "wrong type", "label is -1e999, which"),
  ("classification", {"text": "a", "label": "9" * 5000}, "wrong type", "not a finite number"),
  ("tagging", {"words": ["a"]}, "missing field", "no 'tags'"),
  ("tagging", {"words": [], "tags": []}, "empty", "no text but white space"),
  ("multi_label", {"text": "a", "labels": "x"}, "wrong type", "labels is a string, but not JSON"),
  ("multi_label", {"text": "a", "labels": ["x", "x"]}, "wrong type", "labels holds 'x' twice"),
  ("multi_label", {"text": "a", "labels": [["x"]]}, "wrong type", "neither a string nor"),
  ("multi_label", {"text": "a", "labels": [True]}, "wrong type", "labels holds 'True', neither"),
  ("question_answering", question([{"text": "York", "answer_start": 11}]), "answer not in context",
   "answer 'York' is not at answer_start=11 of the context; it begins at 12"),
  ("question_answering", question([{"text": "Rome", "answer_start": 12}]), "answer not in context",
   "the context lacks it"),
  ("question_answering", question([ANSWER, {"text": "York", "answer_start": -5}]),
   "answer not in context", "answer_start=-5"),
  ("question_answering", question([{"text": " ", "answer_start": 3}]), "answer not in context",
   "an answer has no text"),
  ("question_answering", question([{"text": "York"}]), "wrong type", "answers: answer 1 is"),
  ("question_answering", question({"text": ["a", "b"], "answer_start": [1]}), "wrong type",
   "answers has 2 text and 1 answer_start"),
  ("question_answering", question("York"), "wrong type", "answers is a string, but not JSON"),
  ("question_answering", question([ANSWER], question=" "), "empty", "question has no text"),
  ("question_answering", question([], context=""), "empty", "context has no text"),
  ("retrieval", {"query": "a", "positive": "\n"}, "empty", "positive has no text"),
  ("retrieval", {"query": "", "positive": "a"}, "empty", "query has no text"),
  ("seq2seq", {"input": "a", "target": " "}, "empty", "target has no text"),
]  # fmt: skip


@pytest.mark.parametrize("kind, row, rule, words", UNUSABLE)
def test_a_record_that_cannot_be_used_is_counted_with_its_reason(tmp_path, kind, row, rule, words):
  found, dropped = read(tmp_path, kind, row)
  assert not found and dropped.counts == {rule: 1} and dropped.read == 1
  (example,) = dropped.examples[rule]
  assert example.startswith("rows.jsonl:1: ") and words in example


SQUAD = {
  "version": "v2.0",
  "data": [
    {
      "title": "York",
      "paragraphs": [
        {
          "context": CONTEXT,
          "qas": [
            {"id": "a", "question": "Where?", "answers": [ANSWER], "is_impossible": False},
            {"id": "b", "question": "Why?", "answers": [], "is_impossible": True},
            {"id": "c", "question": "When?"},
          ],
        },
        {"context": "No questions."},
      ],
    },
    {"title": "Jim", "paragraphs": [{"context": "Jim.", "qas": [question([], id="d"), "e"]}]},
  ],
}


def test_published_files_of_squad_are_unfolded(tmp_path):
  path = tmp_path / "dev.json"
  path.write_text(json.dumps(SQUAD))
  dropped = documents.Dropped()
  read = documents.documents(
    documents.find(path), kind="question_answering", dropped=dropped, group="title"
  )
  assert [(d.source, d.id, d.group, len(d.fields["answers"])) for d in read] == [
    ("dev.json:1#1", "a", "York", 1),
    ("dev.json:1#2", "b", "York", 0),
    ("dev.json:2#1", "d", "Jim", 0),
  ]
  assert dropped.counts == {"missing field": 1, "wrong type": 2} and dropped.read == 6
  assert "dev.json:1, paragraph 2: " in dropped.examples["wrong type"][0]


@pytest.mark.parametrize("kind", ["tagging", "multi_label", "question_answering", "retrieval"])
def test_the_account_of_a_preparation_adds_up(tmp_path, kind):
  good = {
    "tagging": {"words": ["a", "b"], "tags": ["O", "B-X"]},
    "multi_label": {"text": "a", "labels": ["x", "y"]},
    "question_answering": question([ANSWER]),
    "retrieval": {"query": "a", "positive": "b"},
  }[kind]
  bad = [row for of, row, _, _ in UNUSABLE if of == kind]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in [good, *bad, good]))
  manifest = prepare.prepare(
    path, tmp_path / "data", kind=kind, tokenizer="bytes", validation=0.0, test=0.0
  )
  assert (manifest["read"], manifest["kept"]) == (len(bad) + 2, 2)
  assert sum(manifest["dropped"].values()) == len(bad)
  assert manifest["splits"]["train"]["documents"] == (4 if kind == "retrieval" else 2)
