"""Results given along: each form that a command writes, and a refusal of all else."""

import json

import pytest

from jaxgpt.analysis.report import results
from jaxgpt.errors import UserError

EVALUATION = {
  "split": "test",
  "step": 8,
  "loss": 2.5,
  "bits_per_byte": 1.2,
  "by": {"length": [{"name": "up to 64", "predictions": 9, "loss": 2.0}], "source": []},
}
SCORES = {
  "rows": 20,
  "failed": 1,
  "left_out": {"no answer": 2},
  "scores": {"rougeL": [0.5, 0.4, 0.6]},
  "baseline": {"name": "first words", "rougeL": [0.3, 0.2, 0.4]},
}
HARNESS = {"step": 8, "tasks": {"arc": {"acc": 0.5, "acc_stderr": 0.1, "f1/strict": 0.25}}}
PARITY = {
  "checked": True,
  "tokenizer": {"equal": True, "why_not": ""},
  "logits": {"max_abs": 1e-6, "scale": 3.0},
}


@pytest.mark.parametrize(
  "content, titles, row",
  [
    (
      EVALUATION,
      ["r.json: test at step 8", "r.json: test at step 8, by length"],
      ("bits_per_byte", 1.2),
    ),
    (SCORES, ["r.json: 20 rows"], ("rougeL", "baseline: first words", 0.3, 0.2, 0.4)),
    (HARNESS, ["r.json: tasks of the harness at step 8"], ("arc", "f1/strict", 0.25, None, None)),
    (PARITY, ["r.json: parity with transformers"], ("logits: max_abs", 1e-6)),
  ],
)
def test_each_form_becomes_tables(tmp_path, content, titles, row):
  path = tmp_path / "r.json"
  path.write_text(json.dumps(content))
  found = results.read(path)
  assert [table.title for table in found] == titles
  assert row in found[0].rows and all(len(r) == len(found[0].head) for r in found[0].rows)


def test_intervals_of_the_harness_are_standard_errors(tmp_path):
  path = tmp_path / "r.json"
  path.write_text(json.dumps(HARNESS))
  (table,) = results.read(path)
  task, metric, *numbers = table.rows[0]
  assert (task, metric) == ("arc", "acc") and numbers == pytest.approx([0.5, 0.304, 0.696])
  assert len(table.rows) == 2  # the error has no row of its own


def test_failed_and_left_out_rows_are_said(tmp_path):
  path = tmp_path / "r.json"
  path.write_text(json.dumps(SCORES))
  (table,) = results.read(path)
  assert "failed: 1" in table.note and "left out: 2" in table.note


@pytest.mark.parametrize("text", ["{", "[1]", '{"loss": 1}', "\xff"])
def test_another_file_is_refused(tmp_path, text):
  path = tmp_path / "r.json"
  path.write_bytes(text.encode("latin-1"))
  with pytest.raises(UserError, match=r"--results=.*r\.json: not"):
    results.read(path)
