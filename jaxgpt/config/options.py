"""Options of commands and library functions, each declared once as a field of a dataclass.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ShowOptions:
      path: str = option(positional=True, metavar="DIR", help="prepared folder")
      rows: int = option(3, least=1, help="rows to show")

      def __post_init__(self) -> None:
        options.check(self)

The declaration gives the default, the type, the range and the help. The argument parser, `--help`,
the checks and docs/cli.md follow from it. A field without a default is a required option.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from jaxgpt.errors import UserError, nearest

_KEY = "option"  # of a field's metadata
_2_31 = 2**31  # the limit of counts and seeds: they fit 32 bits


@dataclasses.dataclass(frozen=True)
class Group:
  """A heading under which `--help` lists options."""

  title: str
  description: str = ""


@dataclasses.dataclass(frozen=True)
class Option:
  """The declaration of one option.

  Attributes:
    help: One phrase in lower case, without a period.
    metavar: Name of the value in `--help`. Default: the choices, N or X for a number, or the
      option's name in capitals.
    flag: Name on the command line, if the field is called otherwise.
    choices: The allowed values.
    least, above, most, below: The range of a number: value >= least, > above, <= most, < below.
    positional: The value is given without a flag.
    parse: Reads one value from text and raises ValueError with a reason. Default: the field's type.
    unset: The behavior without the option, in words, if the default does not say it.
    group: Heading in `--help`.
    modes: Modes of the command that use this option. See `refuse_unused`. Default: all.
    selects: {value: mode of the command that it selects}.
    overrides: The field collects the config overrides (`--config.KEY=VALUE`).
    name: Name of the field.
    value_type: bool, int, float or str. For a repeated option, the type of one value.
    repeated: The field is a tuple: the option may be repeated, or has several values if positional.
    required: The field has no default.
    default: The default, if any.
  """

  help: str
  metavar: str | None = None
  flag: str | None = None
  choices: tuple[str, ...] = ()
  least: float | None = None
  above: float | None = None
  most: float | None = None
  below: float | None = None
  positional: bool = False
  parse: Callable[[str], Any] | None = None
  unset: str | None = None
  group: Group | None = None
  modes: tuple[str, ...] = ()
  selects: Mapping[Any, str] = dataclasses.field(default_factory=dict)
  overrides: bool = False
  name: str = ""
  value_type: type = str
  repeated: bool = False
  required: bool = False
  default: Any = None

  @property
  def label(self) -> str:
    """The option as a user types it: '--seq-len', or the metavar of a positional one."""
    if self.positional:
      return self.value_name
    return f"--{self.flag or self.name.replace('_', '-')}"

  @property
  def value_name(self) -> str:
    """The name of its value in `--help`."""
    if self.metavar:
      return self.metavar
    if self.choices:
      return f"{{{','.join(self.choices)}}}"
    if self.value_type is not str:
      return "N" if self.value_type is int else "X"
    return (self.flag or self.name).upper()

  def problem(self, value: Any) -> str | None:
    """The reason why a value is not allowed, such as 'must be at least 1', or None."""
    if self.choices and value not in self.choices:
      return f"{nearest(str(value), self.choices)}choose one of {', '.join(self.choices)}"
    bounds = (
      (self.least, "at least", lambda bound: value >= bound),
      (self.above, "above", lambda bound: value > bound),
      (self.most, "at most", lambda bound: value <= bound),
      (self.below, "below", lambda bound: value < bound),
    )
    given = [(bound, words, holds) for bound, words, holds in bounds if bound is not None]
    if all(holds(bound) for bound, _, holds in given):  # NaN is in no range
      return None
    return "must be " + " and ".join(f"{words} {_number(bound)}" for bound, words, _ in given)

  def read(self, text: str) -> Any:
    """One value from the command line.

    Raises:
      ValueError: The text is not a value of this option. The message gives the reason.
    """
    if self.parse:
      return self.parse(text)
    try:
      value = self.value_type(text)
    except ValueError:
      kind = "an integer" if self.value_type is int else "a number"
      raise ValueError(f"{text!r} is not {kind}") from None
    if problem := self.problem(value):
      raise ValueError(f"{text}: {problem}" if self.choices else f"{text} {problem}")
    return value

  def range_text(self) -> str:
    """The range in short, such as '≥ 1', '> 0 and < 1', or ''. Leaves out the limit of 32 bits."""
    bounds = (("≥", self.least), (">", self.above), ("≤", self.most), ("<", self.below))
    return " and ".join(f"{sign} {_number(x)}" for sign, x in bounds if x not in (None, _2_31))


def _number(x: float) -> str:
  return "2^31" if x == _2_31 else f"{x:g}"


def option(default: Any = dataclasses.MISSING, **declaration: Any) -> Any:
  """A dataclass field that declares an option.

  Args:
    default: The default. Without one the option is required.
    **declaration: Fields of `Option`, from `help` to `overrides`.
  """
  return dataclasses.field(default=default, metadata={_KEY: Option(**declaration)})


def integer(default: Any = dataclasses.MISSING, *, least: int = 0, **declaration: Any) -> Any:
  """An option whose value fits 32 bits: a count, a step or a seed."""
  return option(default, least=least, below=_2_31, **declaration)


BEST = "best"


def checkpoint_step() -> Any:
  """The option of a command that uses a checkpoint: its step, or 'best' (`checkpoint.best`)."""

  def parse(text: str) -> int | str:
    if text == BEST or (text.isascii() and text.isdecimal() and int(text) < _2_31):
      return text if text == BEST else int(text)
    raise ValueError(f"{text!r} is neither the step of a checkpoint nor {BEST}")

  return option(
    None,
    parse=parse,
    metavar="N",
    unset="the newest",
    help=f"step of the checkpoint; {BEST}: the one that checkpoint.best kept",
  )


def overrides() -> Any:
  """The field of a command that takes config overrides. It holds them as the user typed them."""
  return option((), help="config overrides", overrides=True)


def declared(cls: type) -> list[Option]:
  """The options of a dataclass in the order of its fields, without the config overrides."""
  return [o for o in _all(cls) if not o.overrides]


def takes_overrides(cls: type) -> str | None:
  """The name of the field that collects config overrides, or None."""
  return next((o.name for o in _all(cls) if o.overrides), None)


def _all(cls: type) -> list[Option]:
  hints = typing.get_type_hints(cls)
  out = []
  for field in dataclasses.fields(cls):
    found = field.metadata[_KEY]
    hint, repeated = hints[field.name], False
    if isinstance(hint, types.UnionType):  # `int | None`
      hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
      hint, repeated = typing.get_args(hint)[0], True
    required = field.default is dataclasses.MISSING
    out.append(
      dataclasses.replace(
        found,
        name=field.name,
        value_type=hint,
        repeated=repeated,
        required=required,
        default=None if required else field.default,
      )
    )
  return out


def check(values: Any) -> None:
  """Checks each option of an instance against its choices and range.

  Args:
    values: An instance of a dataclass of options. A value of None is not checked.

  Raises:
    UserError: A value is not allowed.
  """
  for declaration in declared(type(values)):
    value = getattr(values, declaration.name)
    for one in value if declaration.repeated else [value]:
      if one is not None and (problem := declaration.problem(one)):
        if declaration.choices:
          raise UserError(f"{declaration.name}={one!r}: {problem}")
        raise UserError(f"{declaration.name}={one} {problem}")


def refuse_unused(values: Any, mode: str) -> None:
  """Refuses options that a mode of the command does not use.

  Args:
    values: An instance of a dataclass of options, some declared with `modes` or `selects`.
    mode: The mode that the options select.

  Raises:
    UserError: An option is given that this mode does not use.
  """
  selectors = {
    selected: o.label if value is True else f"{o.label}={value}"
    for o in declared(type(values))
    for value, selected in o.selects.items()
  }
  for o in declared(type(values)):
    if not o.modes or mode in o.modes or not getattr(values, o.name):
      continue
    if mode in selectors:
      raise UserError(f"{o.label} has no effect with {selectors[mode]}: leave one of them out")
    needed = " or ".join(selectors[m] for m in o.modes)
    raise UserError(f"{o.label} needs {needed}: add it, or leave {o.label} out")


def take(values: Any, cls: type) -> dict[str, Any]:
  """The fields of an instance that a dataclass has too, as keyword arguments for the latter."""
  return {field.name: getattr(values, field.name) for field in dataclasses.fields(cls)}


def key_value(parse: Callable[[str], Any] = str) -> Callable[[str], tuple[str, Any]]:
  """A `parse` function for options written as KEY=VALUE.

  Args:
    parse: Reads the value. Text that it refuses with a ValueError stays text.
  """

  def read(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
      raise ValueError(f"{text!r} is not of the form KEY=VALUE")
    try:
      return key, parse(value)
    except ValueError:
      return key, value

  return read


def flags(cls: type) -> list[str]:
  """The flags of a dataclass of options, such as '--seq-len'."""
  return [o.label for o in declared(cls) if not o.positional]
