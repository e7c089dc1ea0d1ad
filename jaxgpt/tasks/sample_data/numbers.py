"""Numbers in digits and in English words. A number is in one split only."""

import functools
import random

from jaxgpt.tasks.sample_data.grammar import Row

_ONES = (
  "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
  "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
LIMIT = 1_000_000


def words(number: int) -> str:
  """A number below a million in English words.

  Example:
    >>> words(42017)
    'forty-two thousand seventeen'
  """
  if number >= 1000:
    rest = f" {words(number % 1000)}" if number % 1000 else ""
    return f"{words(number // 1000)} thousand{rest}"
  if number >= 100:
    rest = f" {words(number % 100)}" if number % 100 else ""
    return f"{_ONES[number // 100]} hundred{rest}"
  if number >= 20:
    return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")
  return _ONES[number]


@functools.lru_cache(maxsize=2)
def _shuffled(limit: int) -> list[int]:
  found = list(range(limit))
  random.Random("numbers").shuffle(found)
  return found


def of_split(split: str, limit: int = LIMIT) -> list[int]:
  """The numbers below a limit that belong to a split, shuffled."""
  found = _shuffled(limit)
  held_out = limit // 10
  first, last = {"test": (0, held_out), "validation": (held_out, 2 * held_out)}.get(
    split, (2 * held_out, limit)
  )
  return found[first:last]


def make(rng: random.Random, split: str, count: int) -> list[Row]:
  """Rows of kind seq2seq: digits to words."""
  numbers = rng.sample(of_split(split), count)
  return [{"input": str(number), "target": words(number)} for number in numbers]


_ASK = {
  "words": ["Write {a} in words.", "How do you spell {a}?", "{a} in words, please."],
  "next": ["What comes after {a}?", "Which number follows {a}?"],
  "larger": ["Which is larger, {a} or {b}?", "{a} or {b}: which is more?"],
}


def chats(rng: random.Random, split: str, count: int) -> list[Row]:
  """Rows of kind chat: conversations of one or two questions on numbers below 1,000."""
  numbers = of_split(split, 1000)
  out = list[Row]()
  for _ in range(count):
    messages = []
    for _ in range(rng.choice([1, 1, 2])):
      kind, (a, b) = rng.choice(list(_ASK)), rng.sample(numbers, 2)
      question = rng.choice(_ASK[kind]).format(a=a, b=b)
      answer = {
        "words": f"{a} is {words(a)}.",
        "next": f"After {a} comes {a + 1}.",
        "larger": f"{max(a, b)} is larger.",
      }[kind]
      messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    out.append({"messages": messages})
  return out
