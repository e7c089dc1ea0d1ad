"""Steps as a user writes them: NAME or NAME:key=value,key=value."""

import difflib

from jaxgpt.errors import UserError


def parse(spec, flag, table):
  """The name and the options that a spec stands for.

  A value is read as the type of its key's default: a whole number, a number, true or false, a
  string, or (where the default is a tuple) strings between semicolons.

  Args:
    spec: such as 'length' or 'length:min_chars=200,max_chars=100000'.
    flag: the flag it was given with, for messages: '--clean'.
    table: {name: {key: default}}.

  Returns:
    name, {key: value} with all keys of the table.

  Raises:
    UserError: an unknown name or key (with the nearest known one), no value, or a value of
      another type.
  """
  name, _, rest = spec.partition(":")
  if name not in table:
    raise UserError(
      f"{flag}={spec}: no {name!r}{nearest(name, table)}; choose from {', '.join(table)}"
    )
  options = dict(table[name])
  for item in rest.split(",") if rest else ():
    key, equals, value = item.partition("=")
    if key not in options:
      keys = ", ".join(options) or "none"
      raise UserError(
        f"{flag}={spec}: {name} has no key {key!r}{nearest(key, options)}; its keys: {keys}"
      )
    if not equals:
      raise UserError(f"{flag}={spec}: give {key} a value, as in {name}:{key}={table[name][key]}")
    try:
      options[key] = _value(value, table[name][key])
    except ValueError as e:
      kind = type(table[name][key]).__name__
      raise UserError(
        f"{flag}={spec}: {key}={value!r} is no {kind}; its default is {table[name][key]!r}"
      ) from e
  return name, options


def nearest(word, words):
  """', did you mean X?' where a known word is close, or nothing."""
  close = difflib.get_close_matches(word, list(words), n=1)
  return f" (did you mean {close[0]!r}?)" if close else ""


def _value(text, default):
  if isinstance(default, bool):
    if text.lower() not in ("true", "false"):
      raise ValueError(text)
    return text.lower() == "true"
  if isinstance(default, tuple):
    return tuple(part for part in text.split(";") if part)
  return type(default)(text)
