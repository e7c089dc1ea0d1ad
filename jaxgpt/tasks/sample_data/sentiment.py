"""Reviews, good and bad, with negation and contrast. Test templates are in no other split.

A template is a pattern with one clause or two. Each clause is in training, most pairs are.
"""

import itertools
import random

from jaxgpt.tasks.sample_data import grammar
from jaxgpt.tasks.sample_data.grammar import Row

_GOOD = (
  "wonderful brilliant charming delightful excellent moving superb gripping funny beautiful "
  "clever touching splendid lovely memorable fresh witty warm impressive perfect"
).split()
_BAD = (
  "awful boring terrible clumsy dreadful tedious weak shallow dull ugly silly painful poor "
  "tiresome forgettable stale bland cold embarrassing lazy"
).split()
_NOUNS = (
  "film movie story plot acting music script ending book novel show series performance "
  "direction cast dialogue humour opening scenery camera"
).split()
_ADVERBS = "really very truly quite simply deeply rather remarkably".split()

# {x} is of the clause's side, {y} of the other one.
_CLAUSES = [
  "the {n} is {a} {x}",
  "the {n} was {x}",
  "i found the {n} {x}",
  "this is a {x} {n}",
  "it is {a} {x}",
  "the {n} seems {x} to me",
  "we all thought the {n} {x}",
  "what we saw was a {x} {n}",
  "the {x} {n} stays with me",
  "the {n} is not {y}",
  "the {n} was not {y} at all",
  "i never found the {n} {y}",
  "nobody would call the {n} {y}",
  "nothing about the {n} was {y}",
  "i can not call this {n} {y}",
  "i would not say that the {n} was {y}",
]
# {1} is a clause of the label's side. {2} is one of the same side, {3} of the other.
_PATTERNS = [
  "{1}.",
  "{1}!",
  "{1}, and {2}.",
  "although {3}, {1}.",
  "{3}, but {1}.",
  "{1}, although {3}.",
  "some say that {3}, but {1}.",
  "{1}. {2}.",
]


def templates(split: str) -> list[tuple[str, str, str]]:
  """(pattern, clause, clause) of each template of a split."""
  found = [
    (pattern, *clauses)
    for pattern in _PATTERNS
    for clauses in itertools.product(
      _CLAUSES, _CLAUSES if "{2}" in pattern or "{3}" in pattern else [""]
    )
  ]
  random.Random("templates").shuffle(found)
  tenth = len(found) // 10
  first, last = {"test": (0, tenth), "validation": (tenth, 2 * tenth)}.get(
    split, (2 * tenth, len(found))
  )
  return found[first:last]


def make(rng: random.Random, split: str, count: int) -> list[Row]:
  """Rows of kind classification, half of them good."""
  chosen: dict[str, list[tuple[str, str]]] = {}
  for pattern, *clauses in templates(split):
    chosen.setdefault(pattern, []).append((clauses[0], clauses[1]))

  def row() -> Row:
    label = rng.choice(["good", "bad"])
    good = (_GOOD, _BAD) if label == "good" else (_BAD, _GOOD)

    def clause(text: str, own: list[str], other: list[str]) -> str:
      return grammar.fill(text, {"x": own, "y": other, "n": _NOUNS, "a": _ADVERBS}, rng)

    pattern = rng.choice(list(chosen))
    first, second = rng.choice(chosen[pattern])
    slots = {
      "1": clause(first, *good),
      "2": clause(second, *good),
      "3": clause(second, *good[::-1]),
    }
    return {"text": grammar.capitalized(grammar.fill(pattern, slots, rng)), "label": label}

  return grammar.distinct(count, row, lambda r: r["text"])
