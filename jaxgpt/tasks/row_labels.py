"""The labels of rows, in the names of the model that is scored.

Data names a class, perhaps in another case, or gives its position among the names. Preparing data
and `jaxgpt evaluate` follow the same rules, and turn both into numbers. A task compares names.
"""

from collections.abc import Sequence

from jaxgpt.data import label_numbers
from jaxgpt.errors import UserError
from jaxgpt.tasks import task
from jaxgpt.tasks.predict.rows import Row
from jaxgpt.text.tokenizers import labels

_COLUMNS = {"classification": "label", "multi_label": "labels", "tagging": "tags"}


class Named:
  """A function from a row to the same row with the model's names for its labels.

  Example:
    >>> named = Named(task.find("sentiment"), "classification", ["bad", "good"])
    >>> named(Row("in:1", {"text": "fine", "label": 1})).fields["label"]
    'good'
  """

  def __init__(self, scored: task.Task, kind: str, classes: Sequence[str] | None = None):
    """Checks that the task and the model agree on numbers or classes.

    Args:
      scored: The task.
      kind: Kind of the rows.
      classes: Names of the model's classes, empty if it predicts numbers. None: not known, so that
        classes stay as the data names them.

    Raises:
      UserError: The task scores numbers and the model predicts classes, or the reverse.
    """
    self._column = _COLUMNS.get(kind, "")
    numbers = scored.numbers
    if kind == "classification" and classes is not None:
      if numbers is not None and numbers == bool(classes):
        task_of, model_of = ("numbers", "classes") if numbers else ("classes", "numbers")
        raise UserError(
          f"this task scores {task_of}, but the model predicts {model_of}; choose another task"
        )
      numbers = not classes
    self._numbers = kind == "classification" and bool(numbers)
    self._classes = tuple(classes or ())
    self._numbering = labels.Numbering(self._classes)
    self._found: dict[str, str] = {}

  def __call__(self, row: Row) -> Row:
    """The row with the model's names.

    Raises:
      UserError: A label is not a class of the model, or not a number where these are scored.
    """
    value = row.fields.get(self._column)
    if value is None or not (self._numbers or self._classes):
      return row
    if self._numbers:
      if labels.kind_of(str(value)) == "text":
        raise UserError(
          f"{row.where}: label {value!r} is not a number; correct it, or choose a task of classes"
        )
      return row
    name = lambda label: self._name(str(label), row.where)
    named = list(map(name, value)) if isinstance(value, list) else name(value)
    return row._replace(fields={**row.fields, self._column: named})

  def _name(self, label: str, where: str) -> str:
    if label not in self._found:
      number = self._numbering.find(label)
      if number is None and (found := label_numbers.find([label], self._classes)):
        number = found[0]
      if number is None:
        raise UserError(
          f"{where}: label {label!r} is not among the classes of the model, "
          f"{label_numbers.listed(self._classes)}; correct it, or drop these rows"
        )
      self._found[label] = self._classes[number]
    return self._found[label]
