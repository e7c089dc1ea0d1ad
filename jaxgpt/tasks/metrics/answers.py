"""Exact match and F1 of answers to questions, as SQuAD defines them (arXiv:1606.05250).

An answer is compared after its published normalization: lower case, without punctuation, without
the articles a, an and the, and with single spaces. F1 is that of the bags of words. Of several
correct answers the best match counts. An unanswerable question (SQuAD 2.0, arXiv:1806.03822) has
none, and the empty answer is right.
"""

import collections
import re
import string
from collections.abc import Callable, Sequence

from jaxgpt.tasks.bootstrap import Measure, mean_of

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(answer: str) -> str:
  """An answer in the form in which SQuAD compares it.

  Example:
    >>> normalized("The  Eiffel Tower,")
    'eiffel tower'
  """
  return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def f1(predicted: str, wanted: str) -> float:
  """F1 of the words of two answers. If one has no words, 1 if the other has none either."""
  words, others = normalized(predicted).split(), normalized(wanted).split()
  if not words or not others:
    return float(words == others)
  shared = (collections.Counter(words) & collections.Counter(others)).total()
  if not shared:
    return 0.0
  precision, recall = shared / len(words), shared / len(others)
  return 2 * precision * recall / (precision + recall)


def same(predicted: str, wanted: str) -> float:
  """1.0 if two answers are equal after normalization."""
  return float(normalized(predicted) == normalized(wanted))


def _best(
  score: Callable[[str, str], float], predicted: Sequence[str], wanted: Sequence[Sequence[str]]
) -> list[float]:
  # As in SQuAD 2.0's script, answers of which nothing is left do not count as correct ones.
  sets = [[a for a in answers if normalized(a)] or [""] for answers in wanted]
  return [max(score(p, w) for w in ws) for p, ws in zip(predicted, sets, strict=True)]


def exact_match(predicted: Sequence[str], wanted: Sequence[Sequence[str]]) -> Measure:
  """The share of answers that equal one of the correct ones.

  Args:
    predicted: An answer to each question, '' for none.
    wanted: The correct answers to each question. None: it can't be answered.
  """
  return mean_of(_best(same, predicted, wanted))


def mean_f1(predicted: Sequence[str], wanted: Sequence[Sequence[str]]) -> Measure:
  """The mean of each answer's best F1. Arguments as in `exact_match`."""
  return mean_of(_best(f1, predicted, wanted))
