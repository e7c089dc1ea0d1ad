"""The messages of a conversation: the forms that are read, and the words in them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

REASONING = ("reasoning_content", "thinking", "reasoning")  # one thing under three names
# Fields of an assistant's message that it says besides its content.
_CALLS = ("tool_calls", "function_call")
SAID = (*REASONING, *_CALLS)
_FIRST = ("system", "developer")
_RESULTS = ("tool", "function")


def problem(message: Any) -> str:
  """The reason why a value is not a message, or ''.

  A message is {'role': str, 'content': str}. The content may be a list of {'type': 'text', 'text':
  str}, and missing or None where the message has one of `SAID`. 'weight' is 0 or 1.
  """
  if not isinstance(message, Mapping):
    return f"a {type(message).__name__} is not {{role, content}}"
  if not isinstance(message.get("role"), str):
    return "it has no role that is a string: a message is {role, content}"
  content = message.get("content")
  if content is None and not any(message.get(key) for key in SAID):
    return "it has no content: a message is {role, content}"
  if isinstance(content, list):
    for part in content:
      if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
        return f"a part of its content is {part!r:.60}, not {{type: 'text', text: …}}"
  elif content is not None and not isinstance(content, str):
    return f"its content is a {type(content).__name__}, not a string"
  weight = message.get("weight")
  if weight is not None and (isinstance(weight, str) or weight not in (0, 1)):
    return f"its weight is {weight!r}, not one of the numbers 0 and 1"
  return ""


def order_problem(messages: Sequence[Mapping[str, Any]]) -> str:
  """The reason why the roles of a conversation stand in a wrong order, or ''.

  System messages come first. The assistant does not begin, and a tool's result follows a call, or
  another result. Two messages of one role in a row are allowed.
  """
  before, called = "", False
  for number, message in enumerate(messages, 1):
    role = message["role"]
    where = f"message {number} has role {role!r}"
    if role in _FIRST and before and before not in _FIRST:
      return f"{where}, but stands after one of role {before!r}; system messages come first"
    if role == "assistant" and (not before or before in _FIRST):
      return f"{where}, but no user's message comes before it"
    if role in _RESULTS and not called:
      return f"{where}, but no assistant's message with tool_calls comes right before it"
    called = role in _RESULTS or (role == "assistant" and any(message.get(k) for k in _CALLS))
    before = role
  return ""


def text(message: Mapping[str, Any]) -> str:
  """The content of a message as one string."""
  content = message.get("content")
  if isinstance(content, list):
    return "".join(part["text"] for part in content)
  return content or ""


def words(message: Mapping[str, Any]) -> list[str]:
  """All that a message says: its content, then reasoning and calls of tools. No empty strings."""
  found = [text(message)]
  found += [_string(message[key]) for key in SAID if message.get(key)]
  return [string for string in found if string]


def _string(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def tools(value: Any) -> list[dict[str, Any]]:
  """JSON schemas of tools: a list of objects, or the JSON text of one.

  Raises:
    TypeError: It is neither.
  """
  if isinstance(value, str):
    try:
      value = json.loads(value)
    except (ValueError, RecursionError) as e:
      raise TypeError(f"tools is a string, but not JSON: {e}") from e
  if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
    raise TypeError(f"tools is {value!r:.60}, not a list of JSON schemas")
  return value


def variables(name: str, value: Any) -> dict[str, Any]:
  """Variables of a chat template: an object, or the JSON text of one.

  Args:
    name: Name of the field, for messages.
    value: Its value.

  Raises:
    TypeError: It is neither.
  """
  if isinstance(value, str):
    try:
      value = json.loads(value)
    except (ValueError, RecursionError) as e:
      raise TypeError(f"{name} is a string, but not JSON: {e}") from e
  if not isinstance(value, Mapping):
    raise TypeError(f"{name} is {value!r:.60}, not an object such as {{'enable_thinking': false}}")
  return dict(value)
