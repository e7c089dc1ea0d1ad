"""Declarations of config keys: everything that is known about a key, in one object.

The base config, range checks, derived defaults, the freedom to change a key on resume and
docs/config.md all follow from these objects. The folder `keys` holds the declarations.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from jaxgpt.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Interval:
  """The range of a number.

  Attributes:
    low: Smallest value.
    high: Largest value.
    open_low: The value must be above `low`.
    open_high: The value must be below `high`.
  """

  low: float
  high: float = math.inf
  open_low: bool = False
  open_high: bool = False

  def __contains__(self, value: float) -> bool:
    above = value > self.low if self.open_low else value >= self.low
    return above and (value < self.high if self.open_high else value <= self.high)

  def __str__(self) -> str:
    if self.high == math.inf:
      return f"{'above' if self.open_low else 'at least'} {self.low}"
    return (
      f"in {'(' if self.open_low else '['}{self.low}, {self.high}{')' if self.open_high else ']'}"
    )


# A reason of `Key.fixed`.
OF_DATA = (
  "the batch at step N is computed from it, so a part of the data would be read twice or never"
)

AT_LEAST_0 = Interval(0)
AT_LEAST_1 = Interval(1)
ABOVE_0 = Interval(0, open_low=True)
FRACTION = Interval(0, 1)
BELOW_1 = Interval(0, 1, open_high=True)


class Needs(NamedTuple):
  """A condition under which a key, or one of its values, has an effect.

  Attributes:
    words: The condition, to follow "it needs", such as "model.rope.scaling='yarn'".
    holds: Whether a resolved config meets it. For keys of an architecture, it reads only `c.model`.
    keys: The flat keys that it depends on.
    inheritable: Whether a `model` section that was copied from another run may violate it.
  """

  words: str
  holds: Callable[[Any], bool]
  keys: tuple[str, ...] = ()
  inheritable: bool = True


@dataclasses.dataclass(frozen=True)
class Key:
  """One config key.

  Attributes:
    default: The value in `config.base()`. None makes a placeholder of type `value_type`.
    help: What the key does, its unit and its special values.
    value_type: Type of a placeholder's values. Other keys have the type of their default.
    derive: For a placeholder, computes its value from the config being resolved, in which all keys
      declared before this one are set. Without it, a placeholder may stay None.
    unset: For a placeholder, the meaning of None in a few words, such as 'model.width'.
    interval: Range of a number.
    choices: {value: a few words on it} of a key that takes one of several names.
    registered: The names are those of a registry in `jaxgpt.training`, which checks them when the
      step is built. A name FILE.py:NAME stands for an object in a user's file.
    items: {value: a few words on it} of a key that takes a tuple of one or more names.
    check: Raises a UserError for a bad (flat key, value) where the above is not enough.
    free_on_resume: A run may continue with another value. This never changes the result.
    if_changed: A run may continue with another value if its user asks for it, and records that. The
      effect in a few words.
    fixed: The reason why a run cannot continue with another value. Of these three, the innermost
      declaration that has one counts.
    architecture: In the `model` section: the key determines the model's function. False for keys of
      training, memory and speed.
    stored: The numbers in `objective.stored` depend on it.
    needs: The condition under which the key has an effect. A new run with another value than the
      default is refused without it. None: it always has one.
    values_need: {value, or item of a tuple: the condition under which it does what it says}. Unlike
      `needs`, they hold for the default too.
  """

  default: Any
  help: str
  value_type: type | None = None
  derive: Callable[[ml_collections.ConfigDict], Any] | None = None
  unset: str = ""
  interval: Interval | None = None
  choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
  registered: bool = False
  items: Mapping[str, str] = dataclasses.field(default_factory=dict)
  check: Callable[[str, Any], None] | None = None
  free_on_resume: bool = False
  if_changed: str = ""
  fixed: str = ""
  architecture: bool = True
  stored: bool = False
  needs: Needs | None = None
  values_need: Mapping[Any, Needs] = dataclasses.field(default_factory=dict)

  def validate(self, name: str, value: Any) -> None:
    """Checks one value by itself.

    Args:
      name: The flat key, for the message.
      value: Its value. A placeholder may be None.

    Raises:
      UserError: The value is out of range or not one of the choices.
    """
    if value is None:
      return
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f"{name}={value}: must be a finite number")
    if self.interval is not None and value not in self.interval:
      raise UserError(f"{name}={value}: must be {self.interval}")
    if self.choices and value not in self.choices:
      raise UserError(
        f"{name}={value!r}: {nearest(str(value), self.choices)}"
        f"choose one of {', '.join(self.choices)}"
      )
    if self.items and (not value or set(value) - set(self.items)):
      raise UserError(f"{name}={value!r}: give a tuple of one or more of {', '.join(self.items)}")
    if self.check is not None:
      self.check(name, value)


@dataclasses.dataclass(frozen=True)
class Section:
  """A group of keys, one ConfigDict in a config.

  Attributes:
    help: What the section is for, in a sentence.
    members: Keys and sections in the order of the config.
    free_on_resume: All keys of the section are free on resume.
    if_changed: As in `Key`, for keys that do not say anything else.
    fixed: As in `Key`, for keys that do not say anything else.
    needs: As in `Key`, for all keys of the section.
    user_keys: The section is empty in the base config, and users may add any keys to it.
  """

  help: str
  members: Mapping[str, "Key | Section"]
  free_on_resume: bool = False
  if_changed: str = ""
  fixed: str = ""
  needs: Needs | None = None
  user_keys: bool = False

  def config(self) -> ml_collections.ConfigDict:
    """The defaults as an unlocked ConfigDict."""
    c = ml_collections.ConfigDict()
    for name, member in self.members.items():
      if isinstance(member, Section):
        c[name] = member.config()
      elif member.default is None:
        assert member.value_type is not None, name
        c[name] = config_dict.placeholder(member.value_type)
      else:
        c[name] = member.default
    return c

  def flat_keys(self, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Yields (flat key, declaration) of all keys below this section, such as 'optim.lr'."""
    for name, member in self.members.items():
      if isinstance(member, Section):
        yield from member.flat_keys(f"{prefix}{name}.")
      else:
        yield prefix + name, member

  def sections(self, prefix: str = "") -> Iterator[tuple[str, "Section"]]:
    """Yields (flat name, section) of this section, named '' at the root, and all below it."""
    yield prefix.removesuffix("."), self
    for name, member in self.members.items():
      if isinstance(member, Section):
        yield from member.sections(f"{prefix}{name}.")

  def on_path(self, flat: str) -> Iterator["Key | Section"]:
    """Yields the declared sections that a flat key lies in, then its own declaration if any."""
    node: Key | Section = self
    for name in flat.split("."):
      if not isinstance(node, Section) or name not in node.members:
        return
      node = node.members[name]
      yield node
