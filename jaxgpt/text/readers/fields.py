"""Fields of labelled records: the forms that are read, and what is wrong with the others.

Each check takes the value of a column and returns it in one form, whatever the file's format was: a
CSV file, which has only text, may hold a list as JSON.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from jaxgpt.text.readers import messages

UNALIGNED = "unaligned tags"
NO_ANSWER = "answer not in context"
ROLE_ORDER = "role order"
EMPTY = "empty"

# Fields that are labels: no part of a document's text, and never cleaned.
LABELS = ("label", "labels", "tags", "answers")
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")  # text that is one
# Fields that need more than white space.
_TEXTS = ("target", "question", "context", "query", "positive")


class Unusable(Exception):
  """A record whose fields do not fit each other.

  Attributes:
    rule: Name of the rule that it breaks.
    why: The reason.
  """

  def __init__(self, rule: str, why: str):
    super().__init__(why)
    self.rule, self.why = rule, why


def check(kind: str, found: Mapping[str, Any]) -> dict[str, Any]:
  """Checks the fields of a record.

  Args:
    kind: A key of `kinds.KINDS`.
    found: {name: value of its column}, of the columns that are there. Labels may be missing, as in
      records to predict them for.

  Returns:
    {name: value in its one form}:
      words, tags        lists of strings, equally long
      label              a string or a number
      labels             a list of different strings and numbers
      answers            a list of {'text': str, 'answer_start': int}, [] without an answer
      messages, tools, chat_template_kwargs
                         see `messages`
      others             strings

  Raises:
    TypeError: A field is of the wrong type.
    Unusable: The fields do not fit each other, or one that must not be empty is.
  """
  out = {name: _CHECKS.get(name, _string)(name, value) for name, value in found.items()}
  answers = [type(out[name]) for name in ("chosen", "rejected") if name in out]
  if len(set(answers)) > 1:
    raise TypeError("chosen and rejected must both be texts or both be messages")
  if kind == "tagging":
    _check_tags(out["words"], out.get("tags"))
  if kind == "chat" and (problem := messages.order_problem(out["messages"])):
    raise Unusable(ROLE_ORDER, problem)
  if lacking := without_text(out):
    raise Unusable(EMPTY, lacking)
  if kind == "question_answering":
    _check_answers(out["context"], out.get("answers", []))
  return out


def without_text(found: Mapping[str, Any]) -> str | None:
  """The reason why checked fields lack a text that a document needs, or None.

  A document needs each of `_TEXTS` that its kind has, and an answer of the assistant if one of a
  conversation is learned.
  """
  for name in _TEXTS:
    if name in found and not found[name].strip():
      return f"{name} has no text but white space"
  answers = [
    m for m in found.get("messages", ()) if m["role"] == "assistant" and m.get("weight") != 0
  ]
  if answers and not any(word.strip() for m in answers for word in messages.words(m)):
    return "no answer of the assistant has text but white space"
  return None


def texts(name: str, value: Any) -> list[str]:
  """The strings of a checked field that belong to the document's text."""
  if name in LABELS or name in ("tools", "chat_template_kwargs"):
    return []
  if name == "words":
    return [" ".join(value)]
  if isinstance(value, list):
    return [string for message in value for string in messages.words(message)]
  return [value]


def names(found: Mapping[str, Any]) -> list[str]:
  """The strings of checked fields that are names of classes."""
  out = [str(found.get("label", ""))]
  for key in ("labels", "tags"):
    out += map(str, found.get(key, ()))
  return out


def _check_tags(words: list[str], tags: list[str | int] | None) -> None:
  if tags is not None and len(words) != len(tags):
    raise Unusable(UNALIGNED, f"{_count(words, 'word')}, but {_count(tags, 'tag')}")
  for number, word in enumerate(words, 1):
    if not word.strip():
      raise Unusable(UNALIGNED, f"word {number} of {len(words)} has no text but white space")


def _count(items: list[Any], what: str) -> str:
  return f"{len(items)} {what}" + "s" * (len(items) != 1)


def _check_answers(context: str, answers: list[dict[str, Any]]) -> None:
  for answer in answers:
    text, start = answer["text"], answer["answer_start"]
    if not text.strip():
      raise Unusable(NO_ANSWER, "an answer has no text but white space")
    found = context[start : start + len(text)] if start >= 0 else ""
    if found != text:
      elsewhere = context.find(text)
      there = f"; it begins at {elsewhere}" if elsewhere >= 0 else "; the context lacks it"
      raise Unusable(
        NO_ANSWER, f"answer {_short(text)} is not at answer_start={start} of the context{there}"
      )


def _short(text: str) -> str:
  return repr(text if len(text) <= 40 else f"{text[:37]}…")


def _string(name: str, value: Any) -> str:
  if not isinstance(value, str):
    raise TypeError(f"{name} is a {type(value).__name__}, not a string")
  return value


def _label(name: str, value: Any) -> str | int | float:
  if not isinstance(value, str | int | float):
    raise TypeError(f"{name} is {str(value)[:50]!r}, neither a string nor a number")
  if isinstance(value, str) and not value.strip():
    raise TypeError(f"{name} is empty")
  _check_finite(name, value)
  return int(value) if isinstance(value, bool) else value


def _check_finite(name: str, value: str | int | float) -> None:
  """Raises a TypeError for a number that no float can hold, or text that is read as such."""
  if isinstance(value, str) and not NUMBER.fullmatch(value):
    return
  if not abs(float(value) if isinstance(value, str) else value) <= sys.float_info.max:
    raise TypeError(f"{name} is {str(value)[:50]}, which is not a finite number")


def _parsed(name: str, value: Any, of_what: str) -> list[Any]:
  """A list, which tables without lists may hold as JSON text."""
  if isinstance(value, str):
    try:
      value = json.loads(value)
    except (ValueError, RecursionError) as e:
      raise TypeError(f"{name} is a string, but not JSON: {e}") from e
  if not isinstance(value, list):
    raise TypeError(f"{name} is a {type(value).__name__}, not a list of {of_what}")
  return value


def _classes(name: str, value: Any) -> list[str | int]:
  """A list of names of classes, or of their numbers."""
  found = _parsed(name, value, "names of classes")
  for one in found:
    if isinstance(one, bool) or not isinstance(one, str | int):
      raise TypeError(f"{name} holds {str(one)[:50]!r}, neither a string nor a whole number")
    if isinstance(one, str) and not one.strip():
      raise TypeError(f"{name} holds an empty name")
    _check_finite(name, one)
  return found


def _labels(name: str, value: Any) -> list[str | int]:
  found = _classes(name, value)
  twice = [one for i, one in enumerate(found) if str(one) in map(str, found[:i])]
  if twice:
    raise TypeError(f"{name} holds {str(twice[0])[:50]!r} twice")
  return found


def _words(name: str, value: Any) -> list[str]:
  found = _parsed(name, value, "words")
  for number, word in enumerate(found, 1):
    if not isinstance(word, str):
      raise TypeError(f"{name}: word {number} is a {type(word).__name__}, not a string")
  return found


def _answers(name: str, value: Any) -> list[dict[str, Any]]:
  """Answers as SQuAD writes them, or as tables do: {'text': [...], 'answer_start': [...]}."""
  form = "{text, answer_start}"
  if isinstance(value, str):
    try:
      value = json.loads(value)
    except (ValueError, RecursionError) as e:
      raise TypeError(f"{name} is a string, but not JSON: {e}") from e
  if isinstance(value, Mapping):
    given = [value.get(key) for key in ("text", "answer_start")]
    # One answer is written without lists too.
    columns = [x if isinstance(x, list) else [] if x is None else [x] for x in given]
    if len(columns[0]) != len(columns[1]):
      raise TypeError(f"{name} has {len(columns[0])} text and {len(columns[1])} answer_start")
    value = [{"text": text, "answer_start": start} for text, start in zip(*columns)]
  if not isinstance(value, list):
    raise TypeError(f"{name} is a {type(value).__name__}, not a list of {form}")
  out = []
  for number, answer in enumerate(value, 1):
    text, start = (
      (answer.get("text"), answer.get("answer_start"))
      if isinstance(answer, Mapping)
      else (None, None)
    )
    if not isinstance(text, str) or isinstance(start, bool) or not isinstance(start, int):
      raise TypeError(f"{name}: answer {number} is {answer!r:.60}, not {form}")
    out.append({"text": text, "answer_start": start})
  return out


def _messages(name: str, value: Any) -> list[dict[str, Any]]:
  """A list of {role, content}. Tables without lists may hold it as a JSON string."""
  value = _parsed(name, value, "{role, content}")
  for number, message in enumerate(value, 1):
    if problem := messages.problem(message):
      raise TypeError(f"{name}: message {number}: {problem}")
  return value


def _text_or_messages(name: str, value: Any) -> str | list[dict[str, Any]]:
  return _messages(name, value) if isinstance(value, list) else _string(name, value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
  "label": _label,
  "labels": _labels,
  "words": _words,
  "tags": _classes,
  "answers": _answers,
  "messages": _messages,
  "tools": lambda name, value: messages.tools(value),
  "chat_template_kwargs": lambda name, value: messages.variables(name, value),
  "prompt": _text_or_messages,
  "chosen": _text_or_messages,
  "rejected": _text_or_messages,
}
