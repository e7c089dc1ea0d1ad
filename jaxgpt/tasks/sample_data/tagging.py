"""Sentences with people, places, companies and dates. Test templates and names are new."""

import itertools
import random

from jaxgpt.tasks.sample_data import grammar
from jaxgpt.tasks.sample_data.grammar import Row

_FIRST = (
  "Anna Peter Maria Omar Lucy Jan Sofia David Nina Carlos Emma Ali Ruth Tom Elena Viktor Grace "
  "Hugo Ida Leon Mira Oscar Petra Simon"
).split()
_SURNAMES = ("son", "er", "ski", "ez", "ova", "mann", "well")
_PLACES = ("ville", "burg", "ford", "ton", "stadt", "port", "field")
_COMPANIES = ("Ltd", "Corp", "Group", "Industries", "Bank", "Airlines")
_MONTHS = (
  "January February March April May June July August September October November December"
).split()
_ROLES = "doctor teacher engineer painter judge lawyer pilot farmer minister".split()
_VERBS = "praised visited criticized supported left joined mentioned".split()

# A template is an opening, a subject, what it did, and where or when.
_OPENINGS = ["", "On {D} ,", "In {L} ,", "According to {P} ,", "According to {O} ,"]
_SUBJECTS = [
  "{P}",
  "The {r} {P}",
  "{P} , a {r} from {L} ,",
  "{O}",
  "A {r} of {O}",
  "Nobody",
  "The {r}",
]
_DEEDS = [
  "{v} {P}",
  "{v} {O}",
  "works for {O}",
  "was born in {L}",
  "moved from {L} to {L}",
  "hired {P}",
  "opened an office in {L}",
  "told {P} the news",
  "met {P} and {P}",
  "will close the factory of {O}",
  "talked to the {r}",
  "{v} {L}",
]
_ENDS = ["", "on {D}", "in {L}", "with {P}", "near {L}"]


def templates(split: str) -> list[str]:
  """The templates of a split."""
  found = [" ".join(parts) for parts in itertools.product(_OPENINGS, _SUBJECTS, _DEEDS, _ENDS)]
  random.Random("templates").shuffle(found)
  tenth = len(found) // 10
  first, last = {"test": (0, tenth), "validation": (tenth, 2 * tenth)}.get(
    split, (2 * tenth, len(found))
  )
  return found[first:last]


def make(rng: random.Random, split: str, count: int) -> list[Row]:
  """Rows of kind tagging, with tags PER, LOC, ORG and DATE in BIO."""
  chosen = templates(split)
  names = random.Random(f"names of {split}")  # the splits have names of their own

  def entity(slot: str) -> tuple[str, list[str]]:
    if slot == "{P}":
      surname = grammar.invented(names, _SURNAMES, 1)
      return "PER", [surname] if rng.random() < 0.2 else [rng.choice(_FIRST), surname]
    if slot == "{L}":
      place = [grammar.invented(names, _PLACES, 1)]
      return "LOC", [rng.choice(["New", "San", "North"]), *place] if rng.random() < 0.2 else place
    if slot == "{O}":
      return "ORG", [grammar.invented(names), rng.choice(_COMPANIES)]
    day = [str(rng.randint(1, 28)), rng.choice(_MONTHS)]
    return "DATE", [*day, str(rng.randint(1950, 2025))] if rng.random() < 0.5 else day

  def row() -> Row:
    words, tags = list[str](), list[str]()
    for word in [*rng.choice(chosen).split(), "."]:
      if word in ("{P}", "{L}", "{O}", "{D}"):
        type_, found = entity(word)
        words += found
        tags += [f"B-{type_}"] + [f"I-{type_}"] * (len(found) - 1)
      else:
        words.append(grammar.fill(word, {"r": _ROLES, "v": _VERBS}, rng))
        tags.append("O")
    return {"words": words, "tags": tags}

  return grammar.distinct(count, row, lambda r: " ".join(r["words"]))  # type: ignore[arg-type]
