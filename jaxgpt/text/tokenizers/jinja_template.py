"""Jinja chat templates of tokenizers: rendered as in transformers, with the learned ranges.

A template is free to write a conversation as it likes: it may drop the reasoning of earlier turns,
write several marks in one turn, or none. So the turns are found by running it. A second copy of the
template is compiled that also writes private characters, `_OPEN` … `_CLOSE`, where a message's
iteration of a loop begins and ends, and around `{% generation %}` blocks. They are also put around
names of special tokens in the users' strings, so that these stay text. Without these characters,
both copies must write the same.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from jaxgpt.errors import UserError, first_line
from jaxgpt.text.readers import messages as messages_lib
from jaxgpt.text.tokenizers import base, jinja_compile
from jaxgpt.text.tokenizers.base import Message, Range, Tokenizer

_SENTINEL = "\U000f0002"  # stands for an assistant's words, equal to nothing in a template

Tools: TypeAlias = Sequence[Mapping[str, Any]]


class Rendered(NamedTuple):
  """A conversation as a template writes it.

  Attributes:
    text: The text.
    marks: Ranges of the special tokens that the template wrote.
    learned: Ranges that the assistant wrote and that are trained on.
  """

  text: str
  marks: list[Range]
  learned: list[Range]


def render(
  source: str,
  tokenizer: Tokenizer,
  messages: Sequence[Message],
  generate: bool,
  tools: Tools | None = None,
  variables: Mapping[str, Any] | None = None,
) -> Rendered:
  """Writes a conversation.

  The ranges that the template marks with {% generation %} are learned. If it marks none, an
  assistant's message is learned from where the template would have it generated, which is verified,
  up to the last special token of its turn, or to the end of the turn if no special token ends it.

  Args:
    source: The template.
    tokenizer: The tokenizer.
    messages: See `chat_template.Template`.
    generate: See `chat_template.Template`.
    tools: JSON schemas of tools, or None.
    variables: Further variables of the template.

  Raises:
    UserError: jinja2 is not installed, the template refuses the messages or rewrites names of
      special tokens in them, or it does not say where an answer begins.
  """
  names = base.names_pattern(tuple(tokenizer.special_ids))
  if variables:
    jinja_compile.check(source, variables)
  values = {**tokenizer.role_names, **(variables or {})}
  program = _Program(jinja_compile.compiled(source), values, tools, names)
  messages = [_normalized(message) for message in messages]
  whole = program.plain(messages, generate)
  if any(isinstance(m.get("content"), list) for m in messages):
    messages, whole = _in_the_form_it_takes(program, messages, generate, whole)
  if isinstance(whole, UserError):
    raise whole
  marked = program.marked(messages, generate, whole)
  marks = [
    m.span()
    for m in program.names.finditer(whole)
    if not any(a < m.end() and m.start() < b for a, b in marked.plain)
  ]
  learns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
  if "generation" in program.template.features:
    return Rendered(whole, marks, _generated(marked, messages, learns))
  learned = [_Answer(program, messages, i, whole, marked, marks).range() for i in learns]
  return Rendered(whole, marks, [(a, b) for a, b in learned if a < b])


class _Marked(NamedTuple):
  """The positions that the marked copy of a template wrote, in the text without its marks.

  Attributes:
    turns: {message: ranges of its iterations that wrote something}.
    generated: Ranges of {% generation %} blocks.
    plain: Ranges of special tokens' names in strings of the users.
    exact: Whether the copies wrote the same, so that turns and generated ranges are known.
  """

  turns: dict[int, list[Range]]
  generated: list[Range]
  plain: list[Range]
  exact: bool = True


class _Program:
  """A template with all its variables but the messages."""

  def __init__(
    self,
    template: jinja_compile.Template,
    values: dict[str, Any],
    tools: Tools | None,
    names: re.Pattern[str],
  ):
    self.template, self.values, self._tools, self.names = template, values, tools, names

  def plain(self, messages: Sequence[Message], generate: bool = False) -> str | UserError:
    """The text, or the error with which the template refuses the messages."""
    return self._run(self.template.plain, messages, self._tools, generate)

  def marked(self, messages: Sequence[Message], generate: bool, whole: str) -> _Marked:
    """Runs the marked copy.

    Args:
      messages, generate: As in `plain`.
      whole: The result of `plain`.

    Raises:
      UserError: The template rewrites names of special tokens in the messages.
    """
    guarded = [_mapped(m, self._guard) for m in messages]
    tools = _mapped(self._tools, self._guard)
    if guarded == list(messages) and tools == self._tools:
      return self._marks(self.template.marked, messages, tools, generate, whole)
    found = self._marks(self.template.marked, guarded, tools, generate, whole)
    if not found.exact:
      found = self._marks(self.template.plain, guarded, tools, generate, whole)
    if not found.exact or not all(self.names.fullmatch(whole[a:b]) for a, b in found.plain):
      name = self.names.search(json.dumps([messages, self._tools], ensure_ascii=False))
      raise UserError(
        f"the tokenizer's chat template rewrites a message that holds {name and name[0]!r}, the "
        "name of a special token; choose another template"
      )
    return found

  def turn(self, messages: Sequence[Message]) -> tuple[str, Range] | None:
    """The text of a conversation and the range of its last message, if they can be told."""
    whole = self.plain(messages)
    if isinstance(whole, UserError):
      return None
    found = self._marks(self.template.marked, messages, self._tools, False, whole)
    ranges = found.turns.get(len(messages) - 1, [])
    return (whole, ranges[0]) if len(ranges) == 1 else None

  def _guard(self, text: str) -> str:
    return self.names.sub(
      lambda m: f"{jinja_compile.event('P+')}{m[0]}{jinja_compile.event('P-')}", text
    )

  def _run(
    self, template: Any, messages: Sequence[Message], tools: Any, generate: bool
  ) -> str | UserError:
    numbers = {id(message): i for i, message in enumerate(messages)}

    def turn(loop: int, item: Any) -> str:
      if item is None:
        return jinja_compile.event(f"E{loop}:")
      return jinja_compile.event(f"T{loop}:{numbers[id(item)]}") if id(item) in numbers else ""

    values = {"tools": tools, "documents": None, **self.values, "messages": messages}
    try:
      return template.render(add_generation_prompt=generate, _turn=turn, **values)
    except Exception as e:  # a template is a program: it may fail in any way
      return UserError(f"the tokenizer's chat template refuses a conversation: {first_line(e)}")

  def _marks(
    self, template: Any, messages: Sequence[Message], tools: Any, generate: bool, whole: str
  ) -> _Marked:
    text = self._run(template, messages, tools, generate)
    found = _positions(text) if isinstance(text, str) else None
    if found is None or found[0] != whole:
      return _Marked({}, [], [], False)
    return found[1]


def _positions(text: str) -> tuple[str, _Marked] | None:
  """The text without private characters and what they say, or None if they don't match."""
  strings, at, end = list[str](), 0, 0
  found = _Marked({}, [], [])
  opened: dict[str, tuple[int, int]] = {}  # loop -> (message, start of its iteration)
  pairs: dict[str, list[int]] = {"G": [], "P": []}

  def close(loop: str) -> None:
    if loop in opened:
      message, start = opened.pop(loop)
      if "".join(strings)[start:].strip():
        found.turns.setdefault(message, []).append((start, at))

  for event in jinja_compile.EVENT.finditer(text):
    strings.append(text[end : event.start()])
    at, end = at + len(strings[-1]), event.end()
    kind, loop, message, pair, side = event.groups()
    if kind:
      close(loop)
      if kind == "T":
        opened[loop] = (int(message), at)
    elif side == "+":
      pairs[pair].append(at)
    elif pair and pairs[pair]:
      (found.generated if pair == "G" else found.plain).append((pairs[pair].pop(), at))
    else:
      return None
  strings.append(text[end:])
  if any(pairs.values()):
    return None
  return "".join(strings), found


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
  """A copy of a JSON value with changed strings. Keys stay."""
  if isinstance(value, str):
    return change(value)
  if isinstance(value, Mapping):
    return {key: _mapped(x, change) for key, x in value.items()}
  return [_mapped(x, change) for x in value] if isinstance(value, list | tuple) else value


def _normalized(message: Message) -> Message:
  """A message without its empty fields, its reasoning under the names that templates read."""
  found = {key: value for key, value in message.items() if value is not None}
  reasoning = next((found[key] for key in messages_lib.REASONING if key in found), None)
  if reasoning is None:
    return found
  return {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _in_the_form_it_takes(
  program: _Program, messages: list[Message], generate: bool, whole: str | UserError
) -> tuple[list[Message], str | UserError]:
  """Messages whose contents are lists of parts, as texts if the template does not take lists."""
  lists = [str(m["content"]) for m in messages if isinstance(m.get("content"), list)]
  if isinstance(whole, str) and not any(each in whole for each in lists):
    return messages, whole
  joined = [
    {**m, "content": messages_lib.text(m)} if isinstance(m.get("content"), list) else m
    for m in messages
  ]
  return joined, program.plain(joined, generate)


def _generated(marked: _Marked, messages: Sequence[Message], learns: Sequence[int]) -> list[Range]:
  """The {% generation %} blocks of the messages that are learned."""
  if not marked.exact:
    raise UserError("the tokenizer's chat template hides its generation blocks; choose another one")
  left_out = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i not in learns]
  not_learned = [turn for i in left_out for turn in marked.turns.get(i, [])]
  if left_out and len({i for i in left_out if i in marked.turns}) < len(left_out):
    raise UserError(
      "the tokenizer's chat template does not say which turn has weight 0; choose another template"
    )
  return [
    (a, b)
    for a, b in marked.generated
    if a < b and not any(start <= a and b <= end for start, end in not_learned)
  ]


class _Answer:
  """An assistant's message in a conversation: which part of the text is learned."""

  def __init__(
    self,
    program: _Program,
    messages: Sequence[Message],
    i: int,
    whole: str,
    marked: _Marked,
    marks: Iterable[Range],
  ):
    self._program, self._messages, self._i, self._whole = program, messages, i, whole
    self._marks = list(marks)
    turns = marked.turns.get(i, [])
    self._turn = turns[0] if len(turns) == 1 else None

  def range(self) -> Range:
    """The learned range: from where the message is generated up to the mark that ends it."""
    prompt = self._program.plain(self._messages[: self._i], True)
    if self._turn is None:
      return self._between_renderings(prompt)
    start, end = self._turn
    if isinstance(prompt, str) and self._whole.startswith(prompt) and len(prompt) <= end:
      start = max(start, len(prompt))
    else:
      start += len(self._header(prompt))
    return start, self._end(start, end)

  def _between_renderings(self, prompt: str | UserError) -> Range:
    """The range of a template without a loop over the messages: the difference of renderings."""
    after = self._program.plain(self._messages[: self._i + 1])
    if (
      isinstance(prompt, str)
      and isinstance(after, str)
      and after.startswith(prompt)
      and self._whole.startswith(after)
    ):
      return len(prompt), self._end(len(prompt), len(after))
    raise self._error()

  def _error(self) -> UserError:
    return UserError(
      f"the tokenizer's chat template does not say where message {self._i + 1}, an answer, begins; "
      "choose another template"
    )

  def _header(self, prompt: str | UserError) -> str:
    """The part of the turn that the generation prompt writes.

    The template writes earlier turns differently once there is this one (without their reasoning,
    for example). So the header is what stands in front of the answer in the conversation that ends
    with it, or else what the template adds to a conversation if it is to generate. The turn must
    begin with it.
    """
    before = list(self._messages[: self._i])
    if isinstance(prompt, UserError):  # no conversation begins with an answer, so ask something
      before = [{"role": "user", "content": "?"}]
      prompt = self._program.plain(before, True)
    if isinstance(prompt, UserError):
      raise self._error()
    message = self._messages[self._i]
    start, end = self._turn or (0, 0)
    answer = self._whole[start:end]
    found = self._program.turn([*before, message])
    if found and found[0].startswith(prompt):
      header = found[0][found[1][0] : len(prompt)]
      if answer.startswith(header):
        return header
    asked = self._program.plain(before)
    if isinstance(asked, str) and prompt.startswith(asked):
      header = prompt[len(asked) :]
      if answer.startswith(header):
        return header
    # The prompt opens something that this answer does not have, such as its reasoning.
    words = {k: v for k, v in message.items() if k not in messages_lib.REASONING}
    if words.get("content"):
      words["content"] = _SENTINEL
    found = self._program.turn([*before, words])
    if not found:
      raise self._error()
    text, (first, _) = found
    shared = next((n for n, (a, b) in enumerate(zip(prompt, text)) if a != b), len(text))
    for name in self._program.names.finditer(text):
      if name.start() < shared < name.end():
        shared = name.start()
    header = text[first:shared]
    if shared < first or not answer.startswith(header):
      raise self._error()
    return header

  def _end(self, start: int, end: int) -> int:
    """The end of the last special token of a turn, if only white space follows it in the turn."""
    whole = self._whole
    bos = self._program.values.get("bos_token")
    bos = None if bos == self._program.values.get("eos_token") else bos
    inside = [(a, b) for a, b in self._marks if start <= a and b <= end and whole[a:b] != bos]
    if inside and not whole[inside[-1][1] : end].replace(bos or "", "").strip():
      return inside[-1][1]
    if self._i == len(self._messages) - 1:  # the mark may come after the loop
      eos = self._program.values.get("eos_token")
      after = next(((a, b) for a, b in self._marks if a >= end), (end, end))
      if whole[slice(*after)] == eos and not whole[end : after[0]].strip():
        return after[1]
    return end
