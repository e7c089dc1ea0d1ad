"""Names of classes in config.json, as transformers reads and writes them."""

import pytest

from jaxgpt.errors import UserError
from jaxgpt.hf import labels

NAMED = {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}}
GENERIC = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}


@pytest.mark.parametrize(
  "hf, names",
  [
    (NAMED, ("good", "bad")),
    (NAMED | {"problem_type": "single_label_classification"}, ("good", "bad")),
    (NAMED | {"problem_type": "multi_label_classification"}, ("good", "bad")),
    ({"id2label": {"1": "bad", "0": "good"}}, ("good", "bad")),
    ({"id2label": {0: 7, 1: 9}}, ("7", "9")),
    ({"id2label": NAMED["id2label"], "label2id": GENERIC["label2id"]}, ("good", "bad")),
    ({"id2label": GENERIC["id2label"], "label2id": NAMED["label2id"]}, ("good", "bad")),
    ({"label2id": NAMED["label2id"]}, ("good", "bad")),
    (GENERIC, ("LABEL_0", "LABEL_1")),
    ({}, ("LABEL_0", "LABEL_1")),
  ],
)
def test_names_in_the_order_of_the_outputs(hf, names):
  assert labels.read(hf, 2) == names


@pytest.mark.parametrize(
  "hf, num, words",
  [
    ({"id2label": NAMED["id2label"], "label2id": {"good": 1, "bad": 0}}, 2, "good, bad.*bad, good"),
    ({"id2label": {"1": "a", "2": "b"}}, 2, r"id2label numbers \[1, 2\], .* outputs 0 to 1"),
    ({"id2label": {"0": "a", "1": "a"}}, 2, "names two outputs alike"),
    ({"id2label": ["a", "b"]}, 2, "map numbers and names"),
    (NAMED | {"problem_type": "regression"}, 2, "'regression' with 2 labels"),
    ({"problem_type": "single_label_classification"}, 1, "with 1 labels"),
  ],
)
def test_what_cannot_be_read(hf, num, words):
  with pytest.raises(UserError, match=words):
    labels.read(hf, num)


def test_a_regression_has_no_classes():
  assert labels.read({"id2label": {"0": "LABEL_0"}}, 1) == ()
  assert labels.write((), 1) == {
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "problem_type": "regression",
  }


@pytest.mark.parametrize("name", ["classification", "multi_label"])
def test_the_objective_of_a_classifier_comes_back(name):
  hf = labels.write(("a", "b"), 2) | labels.problem_type(name)
  assert labels.objective(hf) == name and labels.read(hf, 2) == ("a", "b")


@pytest.mark.parametrize("names", [("b", "a"), ("x", "y", "z")])
def test_names_come_back(names):
  assert labels.read(labels.write(names, len(names)), len(names)) == names


def test_outputs_without_a_name_get_a_number():
  assert labels.read(labels.write(("a", "b"), 3), 3) == ("a", "b", "LABEL_2")
