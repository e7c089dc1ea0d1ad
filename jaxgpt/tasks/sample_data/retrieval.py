"""Queries and passages on the same four topics in other words.

A topic has words for queries and words for passages, which differ. Word overlap finds no passage.
"""

import itertools
import random

from jaxgpt.tasks.sample_data import grammar
from jaxgpt.tasks.sample_data.grammar import Row

# (words of queries, words of passages)
_WHO = [
  (["a doctor", "a physician"], ["the surgeon", "medical staff"]),
  (["a teacher", "a tutor"], ["the school", "professors"]),
  (["a farmer", "a grower"], ["the ranch", "peasants"]),
  (["a cook", "a chef"], ["the kitchen", "caterers"]),
  (["a driver", "a motorist"], ["the cabbie", "chauffeurs"]),
  (["a child", "a kid"], ["the toddler", "youngsters"]),
  (["a soldier", "a fighter"], ["the army", "troops"]),
  (["a sailor", "a seaman"], ["the crew", "mariners"]),
  (["a writer", "an author"], ["the novelist", "poets"]),
  (["a thief", "a burglar"], ["the gang", "robbers"]),
]
_WHAT = [
  (["buying", "shopping for"], ["purchased", "acquired"]),
  (["fixing", "mending"], ["repaired", "restored"]),
  (["losing", "misplacing"], ["dropped", "forgot"]),
  (["cleaning", "washing"], ["scrubbed", "polished"]),
  (["painting", "colouring"], ["decorated", "varnished"]),
  (["stealing", "taking"], ["grabbed", "pinched"]),
  (["hiding", "concealing"], ["buried", "covered"]),
  (["selling", "trading"], ["auctioned", "exchanged"]),
  (["building", "making"], ["assembled", "constructed"]),
  (["breaking", "smashing"], ["cracked", "shattered"]),
]
_THING = [
  (["a car", "an automobile"], ["vehicle", "sedan"]),
  (["a house", "a home"], ["cottage", "villa"]),
  (["a boat", "a ship"], ["vessel", "yacht"]),
  (["a watch", "a clock"], ["timepiece", "chronometer"]),
  (["a coat", "a jacket"], ["parka", "anorak"]),
  (["a ring", "a bracelet"], ["jewel", "necklace"]),
  (["a chair", "a seat"], ["stool", "bench"]),
  (["a bike", "a bicycle"], ["tandem", "tricycle"]),
  (["a phone", "a telephone"], ["handset", "mobile"]),
  (["a guitar", "a violin"], ["instrument", "cello"]),
]
_WHEN = [
  (["in winter", "in the cold"], ["january", "the snow season"]),
  (["in summer", "in the heat"], ["july", "the hottest month"]),
  (["at night", "in the dark"], ["midnight", "late hours"]),
  (["in the morning", "early"], ["dawn", "sunrise"]),
  (["at a feast", "at a party"], ["a wedding", "a celebration"]),
  (["in a war", "in a battle"], ["the siege", "the invasion"]),
  (["on a journey", "on a trip"], ["an expedition", "a voyage"]),
  (["at school", "in class"], ["a lesson", "an exam"]),
]
_QUERIES = {
  "train": [
    "{w} {d} {t} {n}",
    "{n} : {w} {d} {t}",
    "story of {w} {d} {t} {n}",
    "{d} {t} {n} by {w}",
  ],
  "validation": ["who was {w} {d} {t} {n}"],
  "test": ["text on {w} {n} {d} {t}", "{n} , {w} and {d} {t}"],
}
_PASSAGES = {
  "train": [
    "during {n} , {w} {d} one {t} .",
    "{w} {d} the {t} . this was during {n} .",
    "it was {n} when {w} {d} their {t} .",
    "the {t} that {w} {d} during {n} is well known .",
  ],
  "validation": ["{w} {d} this {t} during {n} ."],
  "test": ["during {n} the {t} was one that {w} {d} .", "this was {n} . {w} {d} the {t} ."],
}


def make(rng: random.Random, split: str, count: int) -> list[Row]:
  """Rows of kind retrieval. No two have the same four topics."""
  topics = list(itertools.product(_WHO, _WHAT, _THING, _WHEN))
  random.Random("topics").shuffle(topics)
  cut = {"train": (1500, None), "validation": (0, 500), "test": (500, 1500)}[split]
  out: list[Row] = []
  chosen = topics[cut[0] : cut[1]]
  for number in range(min(count, len(chosen))):
    words = dict(zip("wdtn", chosen[number], strict=True))
    row: Row = {}
    for name, side, templates in (("query", 0, _QUERIES), ("positive", 1, _PASSAGES)):
      slots = {key: pair[side] for key, pair in words.items()}
      row[name] = grammar.fill(rng.choice(templates[split]), slots, rng)
    out.append(row)
  return out
