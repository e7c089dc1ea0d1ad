"""Labels of rows as the names of a model's classes: by name, by place, and the refused ones."""

import pytest

from jaxgpt.errors import UserError
from jaxgpt.tasks import row_labels, scoring, task
from jaxgpt.tasks.predict.rows import Row

GENERIC = ("LABEL_0", "LABEL_1", "LABEL_2")


def named(name, kind, classes, column, value):
  make = row_labels.Named(task.find(name), kind, classes)
  return make(Row("in:1", {"text": "a", column: value})).fields[column]


@pytest.mark.parametrize(
  "name, kind, classes, column, value, want",
  [
    ("sentiment", "classification", ("bad", "good"), "label", "good", "good"),
    ("sentiment", "classification", ("bad", "good"), "label", "GOOD", "good"),
    ("sentiment", "classification", ("bad", "good"), "label", 1, "good"),
    ("sentiment", "classification", ("bad", "good"), "label", "0", "bad"),
    ("sentiment", "classification", ("3", "7"), "label", 7, "7"),
    ("sentiment", "classification", GENERIC, "label", 2, "LABEL_2"),
    ("sentiment", "classification", ("bad", "good"), "label", None, None),
    ("multi_label", "multi_label", ("a", "b", "c"), "labels", [2, 0], ["c", "a"]),
    ("multi_label", "multi_label", ("a", "b", "c"), "labels", [], []),
    ("tagging", "tagging", ("O", "B-PER"), "tags", [1, 0], ["B-PER", "O"]),
    ("regression", "classification", (), "label", "2.5", "2.5"),
    ("sentiment", "classification", None, "label", 1, 1),
    ("translation", "seq2seq", (), "target", "x", "x"),
  ],
)
def test_labels_get_the_names_of_the_model(name, kind, classes, column, value, want):
  assert named(name, kind, classes, column, value) == want


@pytest.mark.parametrize(
  "name, classes, value, said",
  [
    ("sentiment", ("bad", "good"), "fine", "in:1: label 'fine' is not among .* bad, good"),
    ("sentiment", ("bad", "good"), 2, "label '2' is not among"),
    ("sentiment", GENERIC, "bad", "label 'bad' is not among .* LABEL_0, LABEL_1"),
    ("regression", (), "fine", "in:1: label 'fine' is not a number"),
    ("regression", None, "nan", "in:1: label 'nan' is not a number"),
    ("regression", ("bad", "good"), 1, "scores numbers, but the model predicts classes"),
    ("sentiment", (), 1, "scores classes, but the model predicts numbers"),
  ],
)
def test_labels_that_the_model_does_not_have_are_refused(name, classes, value, said):
  with pytest.raises(UserError, match=said):
    named(name, "classification", classes, "label", value)


def test_a_right_prediction_of_a_class_given_by_its_place_counts():
  scored = task.find("sentiment")
  make = row_labels.Named(scored, "classification", ("bad", "good"))
  rows = [make(Row(f"in:{n}", {"text": "a", "label": n})) for n in (0, 1)]
  found = scoring.values(scored, rows, [{"label": "bad"}, {"label": "good"}])
  assert found == {"accuracy": 1, "macro_f1": 1}
