"""Steps as users write them: NAME or NAME:key=value,key=value."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

from jaxgpt.errors import UserError, nearest


class Option(NamedTuple):
  """An option of a step. Its type is that of the default."""

  default: Any
  help: str


class Step(Protocol):
  """An entry of a registry of steps."""

  @property
  def options(self) -> Mapping[str, Option]:
    """The options that users may set."""
    ...


StepT = TypeVar("StepT", bound=Step)


def defaults(steps: Mapping[str, StepT]) -> dict[str, dict[str, Any]]:
  """{step: {option: default}} of a registry of steps, as `parse` takes it."""
  return {
    name: {key: option.default for key, option in step.options.items()}
    for name, step in steps.items()
  }


def parse(
  spec: str, flag: str, table: Mapping[str, Mapping[str, Any]]
) -> tuple[str, dict[str, Any]]:
  """Parses a spec.

  A value has the type of its key's default: an integer, a float, true or false, a string, or (if
  the default is a tuple) strings separated by semicolons.

  Args:
    spec: For example 'length' or 'length:min_chars=200,max_chars=100000'.
    flag: The flag that it was given with, for error messages: '--clean'.
    table: {name: {key: default}}.

  Returns:
    (name, {key: value}) with all keys of the table.

  Raises:
    UserError: An unknown name or key, a key without value, or a value of another type.
  """
  name, _, rest = spec.partition(":")
  if name not in table:
    raise UserError(
      f"{flag}={spec}: no {name!r}; {nearest(name, table)}choose one of {', '.join(table)}"
    )
  options = dict(table[name])
  for item in rest.split(",") if rest else ():
    key, equals, value = item.partition("=")
    if key not in options:
      raise UserError(
        f"{flag}={spec}: {name} has no key {key!r}; {nearest(key, options)}its keys: "
        f"{', '.join(options) or 'none'}"
      )
    default = table[name][key]
    if not equals:
      raise UserError(f"{flag}={spec}: give {key} a value, as in {name}:{key}={default}")
    try:
      options[key] = _value(value, default)
    except ValueError as e:
      raise UserError(
        f"{flag}={spec}: {key}={value!r} is no {type(default).__name__}; its default is {default!r}"
      ) from e
  return name, options


def to_text(value: Any) -> str:
  """A value as users write it. `parse` reads it."""
  if isinstance(value, bool):
    return str(value).lower()
  return ";".join(value) if isinstance(value, tuple) else str(value)


def _value(text: str, default: Any) -> Any:
  """A value in the type of a default."""
  if isinstance(default, bool):
    if text.lower() not in ("true", "false"):
      raise ValueError(text)
    return text.lower() == "true"
  if isinstance(default, tuple):
    return tuple(item for item in text.split(";") if item)
  return type(default)(text)
