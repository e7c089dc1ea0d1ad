"""Labels of examples: classes and their order, or numbers.

A label is text, or a number in text: CSV has only text, and JSON has both. One rule holds for both:
a label is an integer, a number with a fraction, or any other text, whatever type the file gave it.

    integers and other texts     classes: integers by value, then texts by their letters
    numbers with a fraction      a regression
    both                         an error that names one of each. `--labels` says what they are

Names that the user lists may be given to integers: class k is the k-th name, counted from 0.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.text.readers.fields import NUMBER

NUMBERS = "numbers"  # --labels=numbers: a regression
RULE = "labels 2"  # name of the rules above, for the reuse of an unfinished preparation
MOST = 100_000  # different classes
_SHOWN = 8  # classes in a line of text
_INTEGER = re.compile(r"[+-]?[0-9]+")


def kind_of(name: str) -> str:
  """'integer', 'fraction' (any other number) or 'text'."""
  if _INTEGER.fullmatch(name):
    return "integer"
  return "fraction" if NUMBER.fullmatch(name) else "text"


def parse(text: str) -> tuple[str, ...]:
  """The classes that `--labels` names in order, (NUMBERS,), or () for ''.

  Args:
    text: 'bad,good', '["a, b", "c"]' for names with commas, 'numbers' or ''.

  Raises:
    UserError: A name is empty or given twice, or there is only one.
  """
  if not text or text == NUMBERS:
    return (text,) if text else ()
  try:
    names = json.loads(text) if text.startswith("[") else text.split(",")
  except ValueError as e:
    raise UserError(f'labels={text}: not a JSON list ({e}); write ["bad", "good"]') from e
  names = tuple(str(name).strip() for name in names)
  if len(set(names)) < len(names) or not all(names) or len(names) < 2:
    raise UserError(
      f"labels={text}: name each class once, two or more in order, such as bad,good; or write "
      f"{NUMBERS} for a regression"
    )
  return names


def of(fields: Mapping[str, Any], kind: str) -> list[str | int | float]:
  """The labels of a document that are classes or numbers.

  Args:
    fields: Its fields.
    kind: A key of `kinds.KINDS`.
  """
  if kind == "classification":
    return [fields["label"]]
  return {"multi_label": fields.get("labels"), "tagging": fields.get("tags")}.get(kind) or []


class Numbering:
  """The numbers of labels.

  Attributes:
    names: Names of the classes in order.
  """

  def __init__(self, names: Sequence[str]):
    self.names = tuple(names)
    self._numbers = {name: number for number, name in enumerate(self.names)}
    self._are_words = not any(kind_of(name) == "integer" for name in self.names)

  def find(self, label: str | int | float) -> int | None:
    """The number of a label: its place among the names, or itself if these are words. Or None."""
    name = str(label)
    number = self._numbers.get(name)
    if number is None and self._are_words and kind_of(name) == "integer":
      number = int(name) if 0 <= int(name) < len(self.names) else None
    return number

  def of(self, label: str | int | float, source: str, field: str = "label") -> int:
    """As `find`, with an error instead of None.

    Args:
      label: The label.
      source: Name of its document, for the message.
      field: Name of the field it is in, for the message.

    Raises:
      UserError: The label is not among the names.
    """
    number = self.find(label)
    if number is None:
      raise UserError(
        f"{source}: label {label!r} is not one of {', '.join(self.names[:20])}; "
        f"name the column of the labels with --field {field}=COLUMN"
      )
    return number


@dataclasses.dataclass
class Seen:
  """The labels of some documents, as plain JSON.

  Attributes:
    kinds: {kind: [documents, a label of that kind, the name of its document]}.
    classes: {label: [documents, the name of the first]}. Without fractions, unless they are listed.
    span: [lowest, highest] number of the fractions, or [].
  """

  kinds: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
  classes: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
  span: list[float] = dataclasses.field(default_factory=list)

  def add(self, label: str | int | float, source: str, listed: bool = False) -> None:
    """Counts a label.

    Args:
      label: The label of a document.
      source: The document's name.
      listed: The user names the classes, so that a fraction may be one.

    Raises:
      UserError: There are more than `MOST` classes.
    """
    name = str(label)
    kind = kind_of(name)
    self.kinds.setdefault(kind, [0, name, source])[0] += 1
    if kind == "fraction":
      low, high = self.span or (float(name), float(name))
      self.span = [min(low, float(name)), max(high, float(name))]
    if kind != "fraction" or listed:
      self.classes.setdefault(name, [0, source])[0] += 1
    if len(self.classes) > MOST:
      raise UserError(
        f"more than {MOST:,} different labels, such as {label!r} in {source}; name the column of "
        "the labels with --field label=COLUMN"
      )

  def merge(self, other: Mapping[str, Any]) -> None:
    """Adds the `dataclasses.asdict` of another."""
    for mine, more in ((self.kinds, other["kinds"]), (self.classes, other["classes"])):
      for key, (count, *rest) in more.items():
        mine.setdefault(key, [0, *rest])[0] += count
    ends = [*self.span, *other["span"]]
    self.span = [min(ends), max(ends)] if ends else []


def choose(seen: Seen, given: Sequence[str] = ()) -> tuple[str, ...]:
  """The classes of a corpus in order, or () if its labels are numbers.

  Args:
    seen: The labels of all documents.
    given: From `parse`.

  Raises:
    UserError: The labels are of several kinds and the user does not say which, or they are not what
      the user says.
  """
  if tuple(given) == (NUMBERS,):
    if "text" in seen.kinds:
      raise UserError(f"labels={NUMBERS}, but {_such(seen, 'text')}; correct or drop these rows")
    return ()
  if given:
    return _all_among(seen, given)
  if "fraction" not in seen.kinds:
    return tuple(in_order(seen.classes))
  if len(seen.kinds) == 1:
    return ()
  other = "text" if "text" in seen.kinds else "integer"
  ways = "correct these rows, or name the classes in order with --labels=A,B,C"
  if other == "integer":
    ways = f"say which: --labels={NUMBERS} for a regression, --labels=A,B,C for classes in order"
  raise UserError(
    f"labels are of two kinds: {_such(seen, 'fraction')}, and {_such(seen, other)}; {ways}"
  )


def choose_classes(seen: Seen, given: Sequence[str] = ()) -> tuple[str, ...]:
  """As `choose`, where labels are never numbers: several for a text, or one for each word.

  Raises:
    UserError: There is no label at all, or one that the user does not list.
  """
  if given:
    return _all_among(seen, given)
  if not seen.classes:
    raise UserError(
      "no document has a label; name the column that holds them with --field NAME=COLUMN, or the "
      "classes with --labels=A,B,C"
    )
  return tuple(in_order(seen.classes))


def _all_among(seen: Seen, given: Sequence[str]) -> tuple[str, ...]:
  """The given names, if all labels are among them, or all are numbers of them."""
  numbering, are_numbers = Numbering(given), set(seen.kinds) == {"integer"}
  others = [
    name
    for name in seen.classes
    if name not in numbering.names and (not are_numbers or numbering.find(name) is None)
  ]
  if others:
    such = ", ".join(f"{name!r} ({seen.classes[name][1]})" for name in others[:3])
    raise UserError(
      f"labels={','.join(given)}: {len(others)} labels of the data are not among them, such as "
      f"{such}; add them, or drop these rows"
    )
  return tuple(given)


def _such(seen: Seen, kind: str) -> str:
  count, name, source = seen.kinds[kind]
  words = {"fraction": "with a fraction", "integer": "whole numbers", "text": "no numbers"}[kind]
  return f"{count:,} are {words}, such as {name[:50]!r} in {source}"


def in_order(names: Iterable[str]) -> list[str]:
  """Names of classes in order: integers by value, then other texts."""
  key = lambda x: (0, int(x), x) if kind_of(x) == "integer" else (1, 0, x)
  return sorted(set(names), key=key)


def describe(seen: Seen, names: Sequence[str]) -> str:
  """A line on the labels of a corpus.

  Args:
    seen: From the documents.
    names: From `choose`.
  """
  if not names:
    found = [*seen.span, *(float(x) for x in seen.classes if kind_of(x) == "integer")]
    return (
      f"labels: numbers from {min(found):g} to {max(found):g}, so this is a regression "
      "(model.num_labels=1); --labels=A,B,C makes them classes"
    )
  numbering, counts = Numbering(names), [0] * len(names)
  for name, (count, _) in seen.classes.items():
    number = numbering.find(name)
    if number is not None:
      counts[number] += count
  shown = [f"{name} ({count:,})" for name, count in zip(names[:_SHOWN], counts)]
  more = f", … {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  return f"labels: {len(names)} classes in this order: {', '.join(shown)}{more}"
