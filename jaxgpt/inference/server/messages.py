"""The messages and tools of a chat request, as chat templates take them."""

import json
from typing import Any

from jaxgpt.inference.server import fields

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MOST_MESSAGES = 4096
_MOST_TOOLS = 128


def read_messages(name: str, value: Any) -> list[dict[str, Any]]:
  """Reads the messages of a conversation.

  Contents that are arrays of text parts become strings, arguments of tool calls objects, and the
  role developer, OpenAI's newer name of it, system.
  """
  messages = fields.items(name, value, 1, _MOST_MESSAGES)
  return [_message(f"{name}[{i}]", message) for i, message in enumerate(messages)]


def _message(where: str, value: Any) -> dict[str, Any]:
  if not isinstance(value, dict):
    raise fields.refuse(where, value, "not an object; a message is {role, content}")
  found = fields.read(
    {f"{where}.{key}": item for key, item in value.items()},
    {
      f"{where}.role": fields.choice(*_ROLES),
      f"{where}.content": _content,
      f"{where}.name": fields.text,
      f"{where}.tool_calls": _tool_calls,
      f"{where}.tool_call_id": fields.text,
      f"{where}.reasoning_content": fields.text,
      f"{where}.refusal": fields.unsupported("refusals are not supported"),
      f"{where}.annotations": fields.unsupported("annotations are not supported", []),
      f"{where}.audio": fields.unsupported("the model reads text alone"),
      f"{where}.function_call": fields.unsupported("it is deprecated: give tool_calls"),
    },
  )
  message = {key.rpartition(".")[2]: item for key, item in found.items() if item is not None}
  if "role" not in message:
    raise fields.RequestError(f"{where}.role: it is missing; give one", param=f"{where}.role")
  if message["role"] == "developer":
    message["role"] = "system"
  calls = message.get("tool_calls")
  if calls and message["role"] != "assistant":
    raise fields.refuse(f"{where}.tool_calls", calls, "only the assistant calls tools")
  if "content" not in message and not (calls or message.get("reasoning_content")):
    raise fields.RequestError(
      f"{where}.content: it is missing; give a string", param=f"{where}.content"
    )
  return message


def _content(name: str, value: Any) -> str:
  if isinstance(value, str):
    return fields.text(name, value)
  parts = []
  for i, part in enumerate(fields.items(name, value)):
    where = f"{name}[{i}]"
    if not isinstance(part, dict) or part.get("type") != "text":
      kind = part.get("type") if isinstance(part, dict) else part
      raise fields.refuse(f"{where}.type", kind, "the model reads text alone; give type 'text'")
    found = fields.read(part, {"type": fields.text, "text": fields.text})
    if "text" not in found:
      raise fields.RequestError(f"{where}.text: it is missing; give a string", param=where)
    parts.append(found["text"])
  return "".join(parts)


def _tool_calls(name: str, value: Any) -> list[dict[str, Any]]:
  out = []
  for i, call in enumerate(fields.items(name, value, 0, _MOST_TOOLS)):
    where = f"{name}[{i}]"
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
      raise fields.refuse(where, call, "not a call; give {id, type, function: {name, arguments}}")
    fields.whole_text(where, call)
    arguments = function.get("arguments", "{}")
    try:
      arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
      raise fields.refuse(f"{where}.function.arguments", arguments, "not JSON") from None
    if not isinstance(arguments, dict):
      raise fields.refuse(f"{where}.function.arguments", arguments, "not an object")
    out.append({**call, "function": {**function, "arguments": arguments}})
  return out


def read_tools(name: str, value: Any) -> list[dict[str, Any]]:
  """Reads the tools that the model may call. The chat template writes them into the prompt."""
  for i, tool in enumerate(tools := fields.items(name, value, 0, _MOST_TOOLS)):
    where = f"{name}[{i}]"
    if not isinstance(tool, dict) or tool.get("type") != "function":
      raise fields.refuse(where, tool, "not a function; give {type: 'function', function: {…}}")
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
      raise fields.refuse(f"{where}.function", function, "it needs a name")
    fields.whole_text(where, tool)
  return list(tools)
