"""Sentences with people, places, companies and dates. Test templates and names are new."""

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

_TRAIN = [
  "{P} works for {O} in {L} .",
  "{P} was born in {L} on {D} .",
  "{O} opened an office in {L} .",
  "The {r} {P} {v} {O} .",
  "On {D} , {P} moved from {L} to {L} .",
  "{P} and {P} met in {L} .",
  "{O} hired {P} on {D} .",
  "Shares of {O} fell on {D} .",
  "According to {P} , {O} will close its factory in {L} .",
  "{L} is the home of {O} .",
  "Trains from {L} were late on {D} .",
  "{P} , a {r} from {L} , {v} {P} .",
  "The talks between {O} and {O} ended on {D} .",
  "In {L} , the {r} was replaced by {P} .",
  "The weather was fine and nobody complained .",
  "A {r} of {O} told {P} the news .",
  "{P} {v} {P} .",
  "{P} {v} the {r} and {v} {O} .",
]
_VALIDATION = [
  "{P} left {L} on {D} .",
  "The {r} of {O} was born in {L} .",
  "{O} and {P} met on {D} .",
]
_TEST = [
  "{P} , who was born in {L} , works for {O} .",
  "On {D} , {O} hired the {r} {P} .",
  "{P} told {P} that {O} will move to {L} .",
  "Nobody from {L} {v} {P} on {D} .",
  "The factory of {O} in {L} was {v} by {P} .",
  "A {r} from {O} {v} {L} .",
]


def make(rng: random.Random, split: str, count: int) -> list[Row]:
  """Rows of kind tagging, with tags PER, LOC, ORG and DATE in BIO."""
  templates = {"train": _TRAIN, "validation": _VALIDATION, "test": _TEST}[split]
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
    for word in rng.choice(templates).split():
      if word in ("{P}", "{L}", "{O}", "{D}"):
        type_, found = entity(word)
        words += found
        tags += [f"B-{type_}"] + [f"I-{type_}"] * (len(found) - 1)
      else:
        words.append(grammar.fill(word, {"r": _ROLES, "v": _VERBS}, rng))
        tags.append("O")
    return {"words": words, "tags": tags}

  return grammar.distinct(count, row, lambda r: " ".join(r["words"]))  # type: ignore[arg-type]
