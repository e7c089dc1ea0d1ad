"""Rows of every format, with and without answers; rows that can't be read keep their place."""

import io
import json

import pytest

from jaxgpt.errors import UserError
from jaxgpt.tasks.predict import rows
from jaxgpt.text.readers import documents


def read(path, kind, **options):
  return list(rows.read(documents.find(str(path)), kind, **options))


def test_rows_need_no_answer_and_faults_keep_their_place(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text(
    '{"text": "one", "id": 7}\n{"text": 3}\nnot json\n{"other": "x"}\n{"text": " "}\n'
    '{"text": "two", "label": "good"}\n'
  )
  found = read(path, "classification")
  assert [row.where for row in found] == [f"a.jsonl:{n}" for n in range(1, 7)]
  assert [row.problem.split(":")[0] for row in found] == [
    *("", "wrong type", "invalid json", "missing field", "empty", "")
  ]
  assert found[0].fields == {"text": "one"} and found[0].id == "7"
  assert found[5].fields == {"text": "two", "label": "good"}


def test_csv_columns_and_lines_of_text(tmp_path):
  (tmp_path / "b.csv").write_text("review,x\nfine,1\n,2\n")
  found = read(tmp_path / "b.csv", "classification", fields={"text": "review"})
  assert [(row.fields, bool(row.problem)) for row in found] == [
    ({"text": "fine"}, False),
    ({}, True),
  ]
  (tmp_path / "c.txt").write_bytes(b"one\r\n\ntwo \xff\nthree")
  found = read(tmp_path / "c.txt", "seq2seq")
  assert [row.fields for row in found] == [{"input": "one"}, {}, {}, {"input": "three"}]
  assert "empty" in found[1].problem and "invalid utf-8" in found[2].problem
  assert found[3].where == "c.txt:4"


@pytest.mark.parametrize(
  "kind, fields",
  [
    ("chat", {"messages": [{"role": "user", "content": "a b"}]}),
    ("tagging", {"words": ["a", "b"]}),
    ("retrieval", {"query": "a b"}),
    ("seq2seq", {"input": "a b"}),
    ("text", {"text": "a b"}),
  ],
)
def test_a_text_alone_is_a_row(kind, fields):
  (found,) = rows.of_values(["a b"], kind)
  assert (found.fields, found.problem) == (fields, "")


def test_a_question_alone_is_refused():
  with pytest.raises(UserError, match='"question" and "context"'):
    rows.of_values(["Who?"], "question_answering")
  (found,) = rows.of_values([{"question": "Who?", "context": "Ann."}], "question_answering")
  assert found.fields["context"] == "Ann."


def test_a_passage_may_be_called_text(tmp_path):
  (tmp_path / "d.jsonl").write_text('{"text": "p"}\n{"query": "q", "positive": "r"}\n')
  found = read(tmp_path / "d.jsonl", "retrieval")
  assert [row.fields for row in found] == [{"query": "p"}, {"query": "q", "positive": "r"}]


def test_published_files_of_squad_and_conll(tmp_path):
  questions = [{"id": "q1", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]}]
  questions.append({"id": "q2", "question": "When?"})
  paragraphs = [{"context": "Ann came.", "qas": questions}]
  (tmp_path / "squad.json").write_text(
    json.dumps({"version": "1.1", "data": [{"title": "T", "paragraphs": paragraphs}]})
  )
  found = read(tmp_path / "squad.json", "question_answering")
  assert [(row.id, row.fields["context"], "answers" in row.fields) for row in found] == [
    ("q1", "Ann came.", True),
    ("q2", "Ann came.", False),
  ]
  (tmp_path / "eng.testa").write_text("EU NNP I-ORG\n. . O\n")
  (row,) = read(tmp_path / "eng.testa", "tagging", form="conll")
  assert row.fields == {"words": ["EU", "."], "tags": ["I-ORG", "O"]}


@pytest.mark.parametrize(
  "text, form", [('\n {"text": "x"}', "jsonl"), ("x\ny", "lines"), ("", "lines")]
)
def test_standard_input_is_json_or_lines(text, form):
  with rows.standard_input(io.BytesIO(text.encode())) as (file, found):
    assert found == form
    texts = [row.fields for row in rows.read([file], "text", form=found) if not row.problem]
  assert texts == ([{"text": "x"}] if form == "jsonl" else [{"text": t} for t in text.split()])


def test_a_wrong_field_or_format_is_an_error(tmp_path):
  (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}))
  with pytest.raises(UserError, match="field 'txt' does not exist"):
    read(tmp_path / "a.jsonl", "text", fields={"txt": "x"})
  with pytest.raises(UserError, match="format='jsnl': did you mean 'jsonl'"):
    read(tmp_path / "a.jsonl", "text", form="jsnl")
