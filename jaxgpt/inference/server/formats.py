"""Fields of a request that prescribe the form of an answer.

OpenAI's response_format, and the extensions guided_json, guided_regex and guided_choice, which
other servers have under the same names.
"""

from collections.abc import Mapping
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.inference.engine.requests import Constraint
from jaxgpt.inference.server import fields
from jaxgpt.inference.server.fields import Reader, RequestError

_MOST_CHOICES = 1024
_ANY_OBJECT = {"type": "object"}


def _schema(name: str, value: Any) -> Constraint:
  return Constraint.of_schema(fields.mapping(name, value))


def _regex(name: str, value: Any) -> Constraint:
  if not fields.text(name, value):
    raise fields.refuse(name, value, "an empty string; give a regular expression")
  return Constraint.of_regex(value)


def _choice(name: str, value: Any) -> Constraint:
  choices = [fields.text(name, each) for each in fields.items(name, value, most=_MOST_CHOICES)]
  try:
    return Constraint.of_choices(choices)
  except UserError as e:
    raise fields.refuse(name, value, str(e)) from None


def _named_schema(name: str, value: Any) -> Constraint:
  """OpenAI's {'name', 'schema', …}. Every schema is followed strictly."""
  found = fields.read(
    fields.mapping(name, value),
    {
      "name": fields.text,
      "description": fields.text,
      "schema": _schema,
      "strict": fields.boolean,
    },
  )
  if "schema" not in found:
    raise RequestError(f"{name}.schema: it is missing; give a JSON schema", param=name)
  return found["schema"]


def _response_format(name: str, value: Any) -> Constraint | None:
  kinds = ("text", "json_object", "json_schema")
  readers: dict[str, Reader] = {"type": fields.choice(*kinds), "json_schema": _named_schema}
  found = fields.read(fields.mapping(name, value), readers)
  kind = found.get("type")
  if kind is None:
    raise RequestError(f"{name}.type: it is missing; give one of {', '.join(kinds)}", param=name)
  if (kind == "json_schema") != ("json_schema" in found):
    raise RequestError(
      f"{name}: type={kind!r} and json_schema do not go together; give both for a schema, or "
      "neither",
      param=name,
    )
  return Constraint.of_schema(_ANY_OBJECT) if kind == "json_object" else found.get("json_schema")


READERS: dict[str, Reader] = {
  "response_format": _response_format,
  "guided_json": _schema,
  "guided_regex": _regex,
  "guided_choice": _choice,
}


def of(found: Mapping[str, Any]) -> tuple[str, Constraint | None]:
  """The form that the fields of a request ask for.

  Args:
    found: {field: value}, read.

  Returns:
    (field, constraint), or ('', None) if any text will do.

  Raises:
    RequestError: Two fields ask for a form.
  """
  given = [(name, found[name]) for name in READERS if found.get(name) is not None]
  if len(given) > 1:
    raise RequestError(
      f"{given[1][0]}: {given[0][0]} asks for a form too; leave one of them out", param=given[1][0]
    )
  return given[0] if given else ("", None)
