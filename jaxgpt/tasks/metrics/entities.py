"""Entities in BIO tags, and their F1 as conlleval and seqeval compute it.

An entity is right if its type, its first and its last word are. Tags follow the rules of conlleval,
so that any sequence of tags has entities, also one that a model predicts and BIO does not allow:

    tags       B-PER I-PER O I-LOC B-LOC I-ORG
    entities   [PER      ]   [LOC] [LOC] [ORG]
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxgpt.tasks.bootstrap import Measure
from jaxgpt.tasks.metrics import classes


class Entity(NamedTuple):
  """An entity: its type, and its words from `start` to before `end`."""

  type: str
  start: int
  end: int


def entities(tags: Sequence[str]) -> list[Entity]:
  """The entities of a sequence of tags: O, B-TYPE, I-TYPE, and also E- and S- of IOBES.

  Example:
    >>> entities(["B-PER", "I-PER", "O", "I-LOC"])
    [Entity(type='PER', start=0, end=2), Entity(type='LOC', start=3, end=4)]
  """
  found: list[Entity] = []
  start, last, last_type = 0, "O", ""
  for i, tag in enumerate([*tags, "O"]):
    mark, _, type_ = tag.partition("-")
    if not type_ and mark not in ("O", "B", "I", "E", "S"):  # a tag without a mark is a type
      mark, type_ = "I", tag
    goes_on = last in ("B", "I") and mark in ("I", "E") and type_ == last_type
    if last != "O" and not goes_on:
      found.append(Entity(last_type, start, i))
    if not goes_on:
      start = i
    last, last_type = mark, type_
  return found


def f1(predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> Measure:
  """F1 over the entities of all sentences (micro average); 1 if there are none at all.

  Args:
    predicted: Tags of each sentence.
    wanted: Tags of the references.

  Raises:
    ValueError: A sentence has another number of tags than its reference.
  """
  pairs = []
  for p, w in zip(predicted, wanted, strict=True):
    if len(p) != len(w):
      raise ValueError(f"{len(p)} tags were predicted for {len(w)} words")
    pairs.append((set(entities(p)), set(entities(w))))
  return classes.f1_of_counts(
    [len(p & w) for p, w in pairs], [len(p) for p, _ in pairs], [len(w) for _, w in pairs]
  )
