"""Templates with slots: sentences from '{name} works in {place}.'"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

Row: TypeAlias = dict[str, object]
Fill: TypeAlias = Callable[[random.Random], str]
_SLOT = re.compile(r"\{(\w+)\}")


def fill(template: str, slots: Mapping[str, str | Sequence[str] | Fill], rng: random.Random) -> str:
  """Fills the slots of a template.

  Args:
    template: Text with slots {name}. A slot of a name that comes twice is filled twice.
    slots: {name: the text, texts to choose from, or a function that makes one}.
    rng: Draws.
  """

  def one(match: re.Match[str]) -> str:
    value = slots[match[1]]
    if callable(value):
      return value(rng)
    return value if isinstance(value, str) else rng.choice(value)

  return _SLOT.sub(one, template)


def capitalized(text: str) -> str:
  """A text with its first letter in upper case."""
  return text[:1].upper() + text[1:]


_ONSETS = "b br c cl d dr f fl g gr h j k kl l m n p pr qu r s sh st t tr v w z".split()
_VOWELS = "a e i o u ai ea ie oa ou".split()
_CODAS = ["", "", "", "l", "m", "n", "r", "s", "k", "nd", "rt"]


def invented(rng: random.Random, endings: Sequence[str] = ("",), syllables: int = 2) -> str:
  """A name that no language has, such as 'Brealton'."""
  parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables)]
  return capitalized("".join(parts) + rng.choice(endings))


def distinct(count: int, make: Callable[[], Row], key: Callable[[Row], object]) -> list[Row]:
  """`count` rows whose keys differ."""
  found: dict[object, Row] = {}
  for _ in range(100 * count):
    row = make()
    found.setdefault(key(row), row)
    if len(found) == count:
      break
  return list(found.values())
