"""The numbers of classes: those of the data, and those of a model trained on other data."""

import re
from collections.abc import Callable, Sequence

from jaxgpt.errors import UserError

_SHOWN = 10


def generic(names: Sequence[str]) -> bool:
  """Whether names say no more than numbers: LABEL_0, LABEL_1, ..., as transformers has them."""
  return all(name == f"LABEL_{i}" for i, name in enumerate(names))


def listed(names: Sequence[str]) -> str:
  """Names in a message, at most ten of them."""
  more = f", … {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  return ", ".join(names[:_SHOWN]) + more


def as_override(names: Sequence[str]) -> str:
  """The override that gives a config these names."""
  return f'--config.model.label_names="{tuple(names)!r}"'


def find(data: Sequence[str], model: Sequence[str]) -> list[int] | None:
  """The model's number of each class of the data, or None if a class is not among the model's.

  Names agree if they are equal, or if they are equal except for the case of letters and that is
  unambiguous. Of a model with generic names, class k is the class that the data calls k.

  Args:
    data: Names of the classes in the data.
    model: Names of the classes in the order of the model's outputs.
  """
  if generic(model) and not generic(data):
    if not all(re.fullmatch("[0-9]+", name) and int(name) < len(model) for name in data):
      return None
    numbers = [int(name) for name in data]
    return numbers if len(set(numbers)) == len(numbers) else None
  as_they_are: Callable[[str], str] = str
  for fold in (as_they_are, str.casefold):
    place = {fold(name): i for i, name in enumerate(model)}
    folded = [fold(name) for name in data]
    unambiguous = len(place) == len(model) and len(set(folded)) == len(data)
    if unambiguous and all(name in place for name in folded):
      return [place[name] for name in folded]
  return None


def numbering(data: Sequence[str], model: Sequence[str], where: str) -> list[int]:
  """As `find`, with an error instead of None.

  Args:
    data: As in `find`.
    model: As in `find`.
    where: Name of the data, for the message.

  Raises:
    UserError: A class of the data is not among the model's. The message has both lists.
  """
  found = find(data, model)
  if found is None:
    raise UserError(
      f"{where} has the classes {listed(data)}, but the model has {listed(model)} "
      "(model.label_names), in the order of its outputs; prepare the data with these names, or "
      "train a model of its own classes, with model.label_names in their order"
    )
  return found
