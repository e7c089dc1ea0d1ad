"""Passages of facts on invented buildings, and questions on them.

A passage has two years, two people and two lengths, so that the kind of an answer is not enough to
find it. Nothing in a test passage is in a passage of another split.
"""

import random

from jaxgpt.tasks.sample_data import grammar
from jaxgpt.tasks.sample_data.grammar import Row

_THINGS = "bridge tower castle church palace theatre library station museum lighthouse".split()
_FIRST = "Anna Peter Maria Omar Lucy Jan Sofia David Nina Carlos Emma Ali Ruth Tom Elena".split()
_STONES = "granite marble brick sandstone limestone oak steel concrete slate copper".split()

# fact -> (sentences that state it, questions on it). {x} is the thing, {v} the answer.
_FACTS = {
  "built": (
    ["{x} was built in {v}.", "Workers completed {x} in {v}.", "{x} dates from {v}."],
    ["When was {x} built?", "In which year was {x} completed?", "What year does {x} date from?"],
  ),
  "restored": (
    [
      "It was restored in {v}.",
      "A restoration ended in {v}.",
      "It was repaired after a fire in {v}.",
    ],
    ["When was {x} restored?", "In which year was {x} repaired?"],
  ),
  "designer": (
    ["It was designed by {v}.", "{v} drew the plans.", "The architect was {v}."],
    ["Who designed {x}?", "Who was the architect of {x}?", "Who drew the plans of {x}?"],
  ),
  "owner": (
    ["Today it belongs to {v}.", "{v} owns it now.", "The present owner is {v}."],
    ["Who owns {x}?", "Who does {x} belong to?", "Who is the present owner of {x}?"],
  ),
  "height": (
    ["It is {v} metres high.", "Its height is {v} metres.", "It rises {v} metres."],
    ["How high is {x}?", "What is the height of {x}?", "How far does {x} rise?"],
  ),
  "length": (
    ["It is {v} metres long.", "Its length is {v} metres."],
    ["How long is {x}?", "What is the length of {x}?"],
  ),
  "place": (
    ["It stands in {v}.", "It can be found in {v}.", "It is a landmark of {v}."],
    ["Where does {x} stand?", "Where can {x} be found?", "Which town has {x} as a landmark?"],
  ),
  "stone": (
    ["Its walls are made of {v}.", "The walls are of {v}."],
    ["What are the walls of {x} made of?"],
  ),
}


def make(rng: random.Random, split: str, count: int) -> list[Row]:
  """Rows of kind question_answering, a question per passage."""
  names = random.Random(f"names of {split}")

  def number(low: int, high: int) -> str:
    """A number that only this split has."""
    found = list(range(low, high))
    random.Random(f"numbers from {low}").shuffle(found)
    fifth = len(found) // 5
    first, last = {"test": (0, fifth), "validation": (fifth, 2 * fifth)}.get(
      split, (2 * fifth, len(found))
    )
    return str(rng.choice(found[first:last]))

  def row() -> Row:
    person = lambda: f"{rng.choice(_FIRST)} {grammar.invented(names)}"
    values = {
      "built": number(1400, 1850),
      "restored": number(1850, 2020),
      "designer": person(),
      "owner": person(),
      "height": number(10, 200),
      "length": number(200, 900),
      "place": grammar.invented(names),
      "stone": rng.choice(_STONES),
    }
    thing = f"the {grammar.invented(names)} {rng.choice(_THINGS)}"
    first, *others = ["built", *rng.sample([f for f in _FACTS if f != "built"], rng.randint(4, 7))]
    asked = rng.choice([first, *others])
    context, start = "", 0
    for fact in [first, *rng.sample(others, len(others))]:
      before, after = rng.choice(_FACTS[fact][0]).replace("{x}", thing).split("{v}")
      context += " " * bool(context)
      sentence = grammar.capitalized(before) + values[fact] + after
      if fact == asked:
        start = len(context) + len(before)
      context += sentence
    question = rng.choice(_FACTS[asked][1]).replace("{x}", thing)
    answer = {"text": values[asked], "answer_start": start}
    return {"question": question, "context": context, "answers": [answer]}

  return grammar.distinct(count, row, lambda r: r["context"])


def generated(rows: list[Row]) -> list[Row]:
  """The same questions as rows of kind seq2seq, for a model that writes its answers."""
  return [
    {"input": f"{row['context']}\n{row['question']}", "target": row["answers"][0]["text"]}  # type: ignore[index]
    for row in rows
  ]
