"""Fields of the JSON body of a request: types, ranges, and errors in OpenAI's format.

Each endpoint has a table {field: reader}. A reader returns the field's value in Python or raises a
`RequestError` that names the field, its value and the way out. A field that is null counts as not
given, as in OpenAI's clients. One that is not in the table is refused: nothing is ignored.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from jaxgpt.errors import nearest

Reader: TypeAlias = Callable[[str, Any], Any]  # (name of the field, value) -> value

_SHOWN = 60  # characters of a value in a message
_DEEPEST = 100  # levels of a body; what reads it may recurse into each
INVALID = "invalid_request_error"


class RequestError(Exception):
  """A request that gets an error as its response.

  Attributes:
    status: HTTP status.
    body: The response's JSON, in OpenAI's format.
    headers: Further headers of the response.
  """

  def __init__(
    self,
    message: str,
    *,
    param: str | None = None,
    status: int = 400,
    code: str | None = None,
    kind: str = INVALID,
    headers: Mapping[str, str] | None = None,
  ):
    """Args: message: What is wrong, and the way out. param: Name of the field."""
    super().__init__(message)
    self.status, self.headers = status, dict(headers or {})
    self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refuse(name: str, value: Any, problem: str) -> RequestError:
  """The error for one field: 'name=value: problem'."""
  try:
    shown = json.dumps(value, ensure_ascii=True)
  except (TypeError, ValueError):
    shown = repr(value)
  if len(shown) > _SHOWN:
    shown = shown[:_SHOWN] + "…"
  return RequestError(f"{name}={shown}: {problem}", param=name)


def parse(body: bytes) -> dict[str, Any]:
  """The JSON object in a request's body.

  Raises:
    RequestError: It is not a JSON object in UTF-8, one of its keys stands there twice, or it is
      nested too deeply.
  """
  too_deep = RequestError("the body is nested too deeply; send a flatter JSON object")
  try:
    value = json.loads(
      body.decode("utf-8"), object_pairs_hook=_without_doubles, parse_constant=_no_constant
    )
  except RecursionError:
    raise too_deep from None
  except ValueError as e:  # UnicodeDecodeError and JSONDecodeError are two
    raise RequestError(f"the body is not JSON in UTF-8 ({e}); send a JSON object") from None
  if not isinstance(value, dict):
    raise RequestError(f"the body is a JSON {_kind(value)}, not an object; send {{…}}")
  if not _is_flat(value):
    raise too_deep
  return value


def _is_flat(value: dict[str, Any]) -> bool:
  """Whether a JSON object has at most `_DEEPEST` levels."""
  level: list[Any] = [value]
  for _ in range(_DEEPEST):
    inner = (one.values() if isinstance(one, dict) else one for one in level)
    level = [item for items in inner for item in items if isinstance(item, dict | list)]
    if not level:
      return True
  return False


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    double = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"the key {double!r} stands twice in one object")
  return found


def _no_constant(name: str) -> Any:
  raise ValueError(f"{name} is not a JSON number")


def _kind(value: Any) -> str:
  names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
  return names.get(type(value), "number")


def read(body: Mapping[str, Any], readers: Mapping[str, Reader]) -> dict[str, Any]:
  """Reads the fields of an object.

  Args:
    body: The object.
    readers: {field: reader}.

  Returns:
    {field: value} of the fields that are given and not null.

  Raises:
    RequestError: A field is unknown, or its value is not allowed.
  """
  for name in body:
    if name not in readers:
      hint = nearest(name, readers)
      shown = name if len(name) <= _SHOWN else name[:_SHOWN] + "…"
      raise RequestError(f"{shown}: there is no such field; {hint}leave it out", param=shown)
  return {
    name: reader(name, body[name]) for name, reader in readers.items() if body.get(name) is not None
  }


def number(*, least: float = -math.inf, most: float = math.inf, above: float = -math.inf) -> Reader:
  """A reader of numbers in a range: least <= value <= most and value > above."""

  def read_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise refuse(name, value, f"a {_kind(value)}; give a number{_range(least, most, above)}")
    try:
      found = float(value)
    except OverflowError:
      found = math.inf
    if not (math.isfinite(found) and least <= found <= most and found > above):
      raise refuse(name, value, f"out of range; give a number{_range(least, most, above)}")
    return found

  return read_number


def integer(*, least: int, most: int = 2**31 - 1) -> Reader:
  """A reader of integers in a range. 3.0 is one, as in JSON."""

  def read_integer(name: str, value: Any) -> int:
    whole = isinstance(value, float) and value.is_integer()
    if isinstance(value, bool) or not (isinstance(value, int) or whole):
      raise refuse(name, value, f"not an integer; give one{_range(least, most)}")
    if not least <= value <= most:
      raise refuse(name, value, f"out of range; give an integer{_range(least, most)}")
    return int(value)

  return read_integer


def _range(least: float, most: float, above: float = -math.inf) -> str:
  words = [
    f"{word} {bound:,}" if isinstance(bound, int) else f"{word} {bound:g}"
    for word, bound in (("from", least), ("above", above), ("to", most))
    if math.isfinite(bound)
  ]
  return "".join(f" {word}" for word in words)


def boolean(name: str, value: Any) -> bool:
  """Reads a boolean."""
  if not isinstance(value, bool):
    raise refuse(name, value, f"a {_kind(value)}; give true or false")
  return value


def text(name: str, value: Any) -> str:
  """Reads a string, which must be Unicode text: no lone surrogates."""
  if not isinstance(value, str):
    raise refuse(name, value, f"a {_kind(value)}; give a string")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError:
    raise refuse(name, value, "half of a surrogate pair; send whole characters") from None
  return value


def whole_text(name: str, value: Any) -> Any:
  """Checks all strings in a JSON value as `text` does, and returns it."""
  if isinstance(value, str):
    text(name, value)
  elif isinstance(value, dict):
    for key, item in value.items():
      text(name, key)
      whole_text(f"{name}.{key}", item)
  elif isinstance(value, list):
    for i, item in enumerate(value):
      whole_text(f"{name}[{i}]", item)
  return value


def choice(*allowed: str) -> Reader:
  """A reader of one of several strings."""

  def read_choice(name: str, value: Any) -> str:
    if value not in allowed or not isinstance(value, str):
      hint = nearest(value, allowed) if isinstance(value, str) else ""
      raise refuse(name, value, f"{hint}choose one of {', '.join(allowed)}")
    return value

  return read_choice


def mapping(name: str, value: Any) -> dict[str, Any]:
  """Reads an object, whose strings must be Unicode text."""
  if not isinstance(value, dict):
    raise refuse(name, value, f"a {_kind(value)}; give an object")
  return whole_text(name, value)


def items(name: str, value: Any, least: int = 1, most: int | None = None) -> Sequence[Any]:
  """Reads an array and checks its length."""
  if not isinstance(value, list):
    raise refuse(name, value, f"a {_kind(value)}; give an array")
  if len(value) < least:
    raise refuse(name, value, f"give at least {least} of them")
  if most is not None and len(value) > most:
    raise refuse(name, value, f"{len(value):,} of them; give at most {most:,}")
  return value


def strings(most: int) -> Reader:
  """A reader of a string that is not empty, or of at most `most` of them."""

  def read_strings(name: str, value: Any) -> tuple[str, ...]:
    several = [value] if isinstance(value, str) else items(name, value, 0, most)
    found = tuple(text(name, each) for each in several)
    if "" in found:
      raise refuse(name, value, "an empty string; give at least one character")
    return found

  return read_strings


def unsupported(why: str, *neutral: Any) -> Reader:
  """A reader of a field that this server has no use for: only its neutral values are allowed."""

  def read_unsupported(name: str, value: Any) -> None:
    if not any(value == each and type(value) is type(each) for each in neutral):
      raise refuse(name, value, f"{why}; leave it out")

  return read_unsupported


def label(name: str, value: Any) -> None:
  """Reads a string that has no effect by its definition, such as `user`."""
  text(name, value)
