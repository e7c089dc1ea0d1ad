"""Scores of a task: by hand, with its baseline, and with rows that do not count."""

import json

import pytest

from jaxgpt.errors import UserError
from jaxgpt.tasks import scoring, task
from jaxgpt.tasks.predict.rows import Row


def rows(*fields):
  return [Row(f"in:{n}", f) for n, f in enumerate(fields, 1)]


def scores(name, given, found):
  report = scoring.report(task.find(name), given, found)
  value = lambda of: {key: round(estimate.value, 4) for key, estimate in of.items()}
  return value(report.scores), value(report.baseline), report


def test_sentiment_counts_failures_as_wrong_and_leaves_out_rows_without_a_label():
  given = rows({"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c"})
  given += [Row("in:4", {}, problem="bad"), *rows({"text": "d", "label": "x"})]
  found = [{"label": "x"}, {"error": "too long"}, {"label": "x"}, {"error": "bad"}, {"label": "x"}]
  got, baseline, report = scores("sentiment", given, found)
  assert got["accuracy"] == baseline["accuracy"] == pytest.approx(2 / 3, abs=1e-4)
  assert (report.scored, report.failed) == (3, 1)
  assert report.left_out == {"no label": 1, "can't be read": 1}
  assert "1 of them without a prediction; 1 more not scored: no label" in report.lines()[0]
  assert report.details[0].startswith("confusion matrix")
  assert json.loads(json.dumps(report.to_json()))["scores"]["accuracy"][0] == pytest.approx(2 / 3)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
  "name, fields, prediction, want, baseline",
  [
    ("regression", [{"label": 1}, {"label": "3.0"}], [{"value": 1.5}, {"value": 3}],
     {"pearson": 1, "mean_squared_error": 0.125}, {"pearson": 0, "mean_squared_error": 1}),
    ("multi_label", [{"labels": ["a", "b"]}, {"labels": []}], [{"labels": ["a"]}, {"labels": []}],
     {"micro_f1": 0.6667, "exact_match": 0.5}, {"micro_f1": 1 * 2 * 2 / 6, "exact_match": 0.5}),
    ("translation", [{"input": "12", "target": "one two"}], [{"text": " one two\n"}],
     {"exact_match": 1}, {"exact_match": 0}),
    ("summarization", [{"input": "A cat. It sat.", "target": "a cat sat"}], [{"text": "a cat sat"}],
     {"rougeL": 1, "rouge1": 1, "rouge2": 1, "rougeLsum": 1}, {"rougeL": 0.8, "rouge1": 0.8}),
    ("question_answering", [{"question": "?", "context": "Ann. Bob.",
      "answers": [{"text": "Bob", "answer_start": 5}]}], [{"answer": "the Bob"}],
     {"f1": 1, "exact_match": 1}, {"f1": 0, "exact_match": 0}),
    ("question_answering", [{"input": "Ann saw Bob.\nWho?", "target": "Bob"}], [{"text": "Bob"}],
     {"f1": 1}, {"f1": 0.5}),
    ("tagging", [{"words": ["In", "Rome"], "tags": ["O", "B-LOC"]}], [{"tags": ["O", "I-LOC"]}],
     {"f1": 1, "accuracy": 0.5}, {"f1": 1, "accuracy": 1}),
    ("chat", [{"messages": CHAT}],
     [{"text": "ho"}], {"exact_match": 1, "rougeL": 1}, {"exact_match": 0}),
    ("retrieval", [{"query": "a", "positive": "a b"}, {"query": "c", "positive": "c d"}],
     [{"embedding": [1, 0], "positive_embedding": [1, 0]}, {"error": "x"}],
     {"recall@1": 0.5, "recall@5": 0.5, "mrr": 0.5}, {"recall@1": 1}),
  ],
)  # fmt: skip
def test_each_task_by_hand(name, fields, prediction, want, baseline):
  got, of_baseline, _ = scores(name, rows(*fields), prediction)
  assert {key: got[key] for key in want} == pytest.approx(want, abs=1e-4)
  assert {key: of_baseline[key] for key in baseline} == pytest.approx(baseline, abs=1e-4)
  assert list(got) == list(of_baseline)


@pytest.mark.parametrize(
  "name, row, metric",
  [
    ("multi_label", {"labels": []}, "exact_match"),
    ("translation", {"input": "x", "target": ""}, "exact_match"),
    ("question_answering", {"question": "?", "context": "x", "answers": []}, "exact_match"),
    ("question_answering", {"question": "?", "context": "x", "answers": []}, "f1"),
    ("tagging", {"words": ["a", "b"], "tags": ["O", "O"]}, "accuracy"),
    ("retrieval", {"query": "a", "positive": "b"}, "recall@1"),
    ("chat", {"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, "exact_match"),
  ],
)
def test_a_row_without_a_prediction_is_wrong_even_if_its_answer_is_empty(name, row, metric):
  found = scoring.values(task.find(name), rows(row), [{"error": "too long"}])
  assert found[metric] == 0


def test_numbers_leave_out_rows_without_a_prediction():
  given, found = rows({"label": 1}, {"label": 9}, {"label": 3}), [{"value": 1}, {"error": "x"}]
  got, _, report = scores("regression", given, [*found, {"value": 3}])
  assert got == {"pearson": 1, "mean_squared_error": 0}
  assert (report.scored, report.failed, report.left_out) == (2, 0, {"no prediction": 1})


def test_a_failed_row_leaves_the_passage_of_another_one():
  given = rows(*[{"query": q, "positive": "p"} for q in "ab"], {"query": "c", "positive": "d"})
  found = [{"embedding": [1, 0], "positive_embedding": [1, 0]}, {"error": "x"}]
  found.append({"embedding": [0, 1], "positive_embedding": [0, 1]})
  assert scoring.values(task.find("retrieval"), given, found)["recall@1"] == pytest.approx(2 / 3)


def test_nothing_to_score_is_an_error():
  with pytest.raises(UserError, match="nothing to score: 1 rows: no target"):
    scores("translation", rows({"input": "x"}), [{"text": "y"}])
  with pytest.raises(UserError, match="the input has no rows"):
    scores("translation", [], [])
  with pytest.raises(UserError, match="did you mean 'sentiment'"):
    task.find("sentimnt")
  with pytest.raises(UserError, match="scores rows of kind seq2seq, but the model"):
    task.find("translation").check_kind("tagging")


def test_files_are_scored_by_line(tmp_path, capsys):
  (tmp_path / "in.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
  out = tmp_path / "out.jsonl"
  out.write_text('{"label": "x"}\n{"label": "x"}\n')
  args = ["--task=sentiment", f"--input={tmp_path / 'in.jsonl'}", f"--predictions={out}"]
  assert scoring.main([*args, "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["scores"]["accuracy"][0] == 0.5
  out.write_text('{"label": "x"}\n')
  assert scoring.main(args) == 2
  assert "1 predictions, but the input has 2 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
  "name, row, prediction, said",
  [
    ("regression", {"text": "a", "label": 1}, {"value": None}, "'value' is 'None', not a number"),
    ("regression", {"text": "a", "label": 1}, {"value": "n/a"}, "'value' is 'n/a', not a number"),
    ("regression", {"text": "a", "label": 1}, {"label": "x"}, "has a 'value', and this one has no"),
    ("regression", {"text": "a", "label": "x"}, {"value": 1}, "in.jsonl:1: label 'x' is not a nu"),
    ("tagging", {"words": ["a"], "tags": ["O"]}, {"tags": None}, "'tags' is 'None', not a list"),
    ("tagging", {"words": ["a"], "tags": ["O"]}, {"tags": ["O"] * 2}, "2 tags for 1 words"),
    ("multi_label", {"text": "a", "labels": ["x"]}, {"labels": None}, "'labels' is 'None', not a"),
    ("sentiment", {"text": "a", "label": "x"}, {"label": None}, "'label' is 'None', not the name"),
    ("retrieval", {"query": "a", "positive": "b"}, {"embedding": ["x"]}, "not a list of numbers"),
  ],
)
def test_predictions_of_another_form_are_refused_by_line(
  name, row, prediction, said, tmp_path, capsys
):
  path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  path.write_text(json.dumps(row) + "\n")
  out.write_text(json.dumps(prediction) + "\n")
  args = [f"--task={name}", f"--input={path}", f"--predictions={out}"]
  assert scoring.main(args) == 2
  found = capsys.readouterr().err
  assert said in found and ("out.jsonl:1: " in found or "in.jsonl:1: " in found)
  out.unlink()
  assert scoring.main(args) == 2 and "can't be read" in capsys.readouterr().err


def test_a_task_of_a_users_file(tmp_path):
  (tmp_path / "own.py").write_text(
    "from jaxgpt.tasks.bootstrap import mean_of\nfrom jaxgpt.tasks.task import Task\n"
    "Length = Task({'seq2seq': 'target'},\n"
    "  lambda rows, found: {'same': mean_of([len(p.get('text', '')) == len(r['target'])\n"
    "    for r, p in zip(rows, found)])}, lambda rows: [{'text': ''}] * len(rows), 'nothing')\n"
  )
  own = task.find("own.py:Length", str(tmp_path))
  report = scoring.report(own, rows({"input": "", "target": "ab"}), [{"text": "xy"}])
  assert report.scores["same"].value == 1 and report.baseline["same"].value == 0
