"""The names of a classifier's classes in config.json: `id2label`, `label2id` and `problem_type`."""

from collections.abc import Mapping
from typing import Any

from jaxgpt.data import label_numbers
from jaxgpt.errors import UserError

HfConfig = dict[str, Any]  # config.json
SEVERAL = "multi_label_classification"  # `problem_type` of any number of classes per text

# Fields of a model for question answering. Its two outputs per token are a start and an end, and no
# classes, so they have no names. A model that tags words has the same head, with names.
ANSWERS: HfConfig = {"num_labels": 2, "label_names": ()}


def finds_answers(c_model: Mapping[str, Any]) -> bool:
  """Whether a model scores starts and ends of answers.

  Args:
    c_model: The `model` section.
  """
  return c_model["head"] == "token_classifier" and all(
    c_model[key] == value for key, value in ANSWERS.items()
  )


def read(hf: HfConfig, num_labels: int) -> tuple[str, ...]:
  """The names of the classes in the order of the outputs, or () for a regression.

  transformers fills in LABEL_0, LABEL_1, ... where a model has no names. They are kept, since they
  say that class k is output k.

  Args:
    hf: config.json.
    num_labels: Number of the model's outputs.

  Raises:
    UserError: The two tables disagree, number other outputs, or the outputs are no single class.
  """
  problem = hf.get("problem_type")
  kind = "regression" if num_labels == 1 else "single_label_classification"
  if problem not in (None, kind, SEVERAL):
    raise UserError(
      f"config.json: problem_type={problem!r} with {num_labels} labels is not supported: the "
      f"objective 'classification' is {kind} there; remove problem_type if the model was trained so"
    )
  if num_labels == 1 and problem != SEVERAL:
    return ()
  default = {i: f"LABEL_{i}" for i in range(num_labels)}
  try:
    of_ids = {int(i): str(name) for i, name in (hf.get("id2label") or default).items()}
    of_names = {int(i): str(name) for name, i in (hf.get("label2id") or {}).items()}
  except (TypeError, ValueError, AttributeError) as e:
    raise UserError(f"config.json: id2label and label2id map numbers and names ({e})") from e
  for key, table in (("id2label", of_ids), ("label2id", of_names)):
    if table and table.keys() != default.keys():
      if key == "label2id" and hf.get("id2label"):
        continue  # two names of one number, or a table that transformers does not use
      raise UserError(
        f"config.json: {key} numbers {sorted(table)[:10]}, but the model has outputs 0 to "
        f"{num_labels - 1}; correct it"
      )
  ordered = lambda table: tuple(table[i] for i in range(num_labels))
  first = ordered(of_ids)
  second = ordered(of_names) if of_names.keys() == default.keys() else first
  if label_numbers.generic(first) and not label_numbers.generic(second):
    first = second  # only label2id was filled in
  elif first != second and not label_numbers.generic(second):
    raise UserError(
      f"config.json: id2label has the classes {label_numbers.listed(first)}, label2id has "
      f"{label_numbers.listed(second)}; correct one of them"
    )
  if len(set(first)) < num_labels:
    raise UserError(
      f"config.json: id2label names two outputs alike ({label_numbers.listed(first)}); correct it"
    )
  return first


def read_tags(hf: HfConfig, num_labels: int) -> tuple[str, ...]:
  """As `read`, for a model that has classes for each token. It has no `problem_type`."""
  if num_labels < 2:
    raise UserError(
      f"config.json: {num_labels} label for each token is not supported: a model that tags words "
      "needs 2 or more"
    )
  return read({**hf, "problem_type": None}, num_labels)


def objective(hf: HfConfig) -> str:
  """The `objective.name` of a classifier of whole texts, by `problem_type`."""
  return "multi_label" if hf.get("problem_type") == SEVERAL else "classification"


def problem_type(objective: str) -> HfConfig:
  """The key of config.json that an objective decides, for a classifier. {} if `write` decides."""
  return {"problem_type": SEVERAL} if objective == "multi_label" else {}


def write(names: tuple[str, ...], num_labels: int) -> HfConfig:
  """The keys of config.json for a classifier.

  Args:
    names: `model.label_names`. Outputs without a name get LABEL_i.
    num_labels: Number of the model's outputs.
  """
  kind = "regression" if num_labels == 1 else "single_label_classification"
  return write_tags(names, num_labels) | {"problem_type": kind}


def write_tags(names: tuple[str, ...], num_labels: int) -> HfConfig:
  """As `write`, for a model that has classes for each token."""
  labels = [*names, *(f"LABEL_{i}" for i in range(len(names), num_labels))]
  return {
    "id2label": {str(i): name for i, name in enumerate(labels)},
    "label2id": {name: i for i, name in enumerate(labels)},
  }
