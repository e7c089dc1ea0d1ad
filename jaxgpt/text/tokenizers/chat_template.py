"""Chat templates: turn the messages of a conversation into pieces of text and special tokens.

A template is data (`FORMATS`), or the Jinja source that came with a tokenizer. Text from users is
always encoded as plain text: no message can inject the mark that ends its turn.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.text.readers import messages as messages_lib
from jaxgpt.text.tokenizers import huggingface, jinja_compile, jinja_template
from jaxgpt.text.tokenizers.base import Message, Tokenizer
from jaxgpt.text.tokenizers.examples import Piece

OWN = "tokenizer"  # the Jinja template that came with the tokenizer


class Turn(NamedTuple):
  """The form of a message: before, lead, content, after, gap.

  Of an assistant's message, lead, content and after are trained on, and generated after `before`.
  """

  before: str = ""
  after: str = ""
  gap: str = ""
  lead: str = ""


class Format(NamedTuple):
  """A chat template. Its strings may hold its marks, and {bos} and {eos} for the tokenizer's.

  Attributes:
    turns: {role: Turn}.
    marks: Special tokens that the tokenizer must have.
    begin: The beginning of a conversation.
    system: If no turn has that role, the form in which a system message, {}, is put in front of the
      first user's message.
    trim: Strip white space around contents.
    raw: Nothing but text separates a prompt from its answer. So the two are tokenized apart: a
      token that reaches over the border could not be generated.
  """

  turns: dict[str, Turn]
  marks: tuple[str, ...] = ()
  begin: str = "{bos}"
  system: str | None = None
  trim: bool = False
  raw: bool = False


def _turns(before: str, after: str, gap: str = "", **renamed: str | None) -> dict[str, Turn]:
  """The same turn for each role, with the format's name of the role. None leaves a role out."""
  names: dict[str, str | None] = {role: role for role in ("system", "user", "assistant")}
  names |= renamed
  return {
    role: Turn(before.replace("{role}", name), after, gap) for role, name in names.items() if name
  }


FORMATS = {
  # The marks of every tokenizer that `jaxgpt data` trains.
  "simple": Format(
    _turns("<|{role}|>", "<|end|>"), ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
  ),
  # Without marks, for tokenizers that have none. A newline ends a question, eos an answer.
  "raw": Format(
    {
      "system": Turn(after="\n"),
      "user": Turn(after="\n"),
      "assistant": Turn(after="{eos}", gap="\n"),
    },
    raw=True,
  ),
  "chatml": Format(
    _turns("<|im_start|>{role}\n", "<|im_end|>", "\n"), ("<|im_start|>", "<|im_end|>"), begin=""
  ),
  "llama2": Format(
    {"user": Turn("{bos}[INST] ", " [/INST]"), "assistant": Turn("", " {eos}", lead=" ")},
    begin="",
    system="<<SYS>>\n{}\n<</SYS>>\n\n",
    trim=True,
  ),
  "llama3": Format(
    _turns("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    trim=True,
  ),
  "gemma": Format(
    _turns("<start_of_turn>{role}\n", "<end_of_turn>", "\n", system=None, assistant="model"),
    ("<start_of_turn>", "<end_of_turn>"),
    system="{}\n\n",
    trim=True,
  ),
}


class Template:
  """Turns messages into pieces, for one tokenizer. Picklable.

  Attributes:
    name: 'tokenizer' or a key of `FORMATS`.
    stop: Name of the special token that ends an assistant's answer, or None if none does.
    stops: Names of all special tokens that end an assistant's turn: an answer, or a call of a tool.
    in_one_go: A conversation is tokenized as a whole, as transformers does, not piece by piece.
  """

  def __init__(
    self,
    name: str,
    tokenizer: Tokenizer,
    source: str | None = None,
    variables: Mapping[str, Any] | None = None,
    last_turn: bool = False,
  ):
    """Use `load`."""
    self.name, self._tokenizer, self._last_turn = name, tokenizer, last_turn
    given = jinja_compile.assignments(variables or {})
    self._source = given + (source or tokenizer.chat_template or "")
    tool_source = None if source else tokenizer.tool_template
    self._tool_source = tool_source and given + tool_source
    ids = {i: token for token, i in tokenizer.special_ids.items()}
    # Where a tokenizer has no bos, eos stands between documents, but does not begin a conversation.
    bos = tokenizer.role_names.get("bos_token", "")
    self._format = FORMATS.get(name)
    if self._format and self._format.raw:
      bos = ids[tokenizer.bos_id]
    self._ends = {"{bos}": bos, "{eos}": ids[tokenizer.eos_id]}
    self.in_one_go = name == OWN or (
      tokenizer.kind == huggingface.HuggingFaceTokenizer.kind
      and not (self._format and self._format.raw)
    )
    if self._format:
      names = [*self._format.marks, *self._ends]
      self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")")
    self.stops = tuple(dict.fromkeys(filter(None, map(self._last_mark, _PROBES))))
    self.stop: str | None = self._last_mark(_PROBES[0])

  def _last_mark(self, answer: Message) -> str | None:
    """The special token that ends what is learned of an answer, if one does."""
    try:
      pieces = [p for p in self([{"role": "user", "content": "a"}, answer]) if p.trained]
    except UserError:  # a template without tools, for example
      return None
    marks = [i for i, p in enumerate(pieces) if p.special]
    if not marks or "".join(p.text for p in pieces[marks[-1] + 1 :]).strip():
      return None
    return pieces[marks[-1]].text

  def __call__(
    self,
    messages: Iterable[Message],
    generate: bool = False,
    tools: jinja_template.Tools | None = None,
    variables: Mapping[str, Any] | None = None,
  ) -> list[Piece]:
    """Writes a conversation as pieces, including all special tokens.

    Args:
      messages: [{'role': str, 'content': str}, …]. A content may also be a list of {'type':
        'text', 'text': str}, and missing where there are 'tool_calls'. The tokenizer's own template
        sees all fields, such as 'reasoning_content'. The others have no place for more than a role
        and a content. An assistant's message with a 'weight' of 0 is not trained on.
      generate: End with the text that precedes an assistant's answer.
      tools: JSON schemas of the tools that the assistant may call. Only for the tokenizer's own
        template.
      variables: Variables of the template, such as {'enable_thinking': False}. Only for the
        tokenizer's own template.

    Returns:
      The pieces. Neighbours that could be one piece are joined.

    Raises:
      UserError: A message has another form, or a role or fields that the template doesn't have, or
        the template does not read a variable.
    """
    messages = [_checked(message) for message in messages]
    if self._last_turn:
      messages = last_turn(messages)
    if not self._format:
      source = (tools and self._tool_source) or self._source
      rendered = jinja_template.render(
        source, self._tokenizer, messages, generate, tools, variables
      )
      return joined(_cut(rendered))
    messages = [_plain(message, self.name) for message in messages]
    for what, value in (("tools", tools), ("template variables", variables)):
      if value:
        raise _no_place(self.name, what)
    form, pieces = self._format, list[Piece]()
    pieces += self._parse(form.begin)
    for message in self._folded(messages):
      turn = form.turns.get(message["role"])
      if turn is None:
        raise UserError(
          f"the chat template {self.name!r} has no place for a message of role "
          f"{message['role']!r}, only for {', '.join(form.turns)}; rename the role "
          "or choose another template"
        )
      content = message["content"].strip() if form.trim else message["content"]
      trained = message["role"] == "assistant" and bool(message.get("weight", 1))
      pieces += self._parse(turn.before)
      pieces.append(Piece(turn.lead + content, trained))
      pieces += self._parse(turn.after, trained)
      pieces += self._parse(turn.gap)
    if generate:
      pieces += self._parse(form.turns["assistant"].before)
    return joined(pieces)

  def begins_with_bos(self) -> bool:
    """Whether a conversation begins with the tokenizer's bos."""
    try:
      first = self([{"role": "user", "content": "a"}], generate=True)[:1]
    except UserError:
      return False
    bos = self._tokenizer.bos_id
    return bool(first and first[0].special and self._tokenizer.special_ids[first[0].text] == bos)

  def to_jinja(self) -> str:
    """The template as Jinja source, for transformers."""
    if self._format is None:
      return self._source
    form, folded = self._format, ""
    text = lambda string: json.dumps(string, ensure_ascii=False)
    at_once = lambda x: x.replace("{bos}", self._ends["{bos}"]).replace(
      "{eos}", self._ends["{eos}"]
    )
    trim = " | trim" if form.trim else ""
    content = f"message['content']{trim}"
    if form.system is not None:
      before, after = form.system.split("{}")
      folded = (
        "{% set system = '' %}{% if messages and messages[0]['role'] == 'system' %}"
        f"{{% set system = {text(before)} + (messages[0]['content']{trim}) + {text(after)} %}}"
        "{% set messages = messages[1:] %}{% if not messages or messages[0]['role'] != 'user' %}"
        "{{ raise_exception('a system message needs a user message after it') }}"
        "{% endif %}{% endif %}"
      )
      content = f"((system if loop.first else '') + ({content})){trim}"
    turns = "".join(
      f"{{% {'elif' if i else 'if'} message['role'] == {text(role)} %}}"
      f"{{{{ {text(at_once(turn.before) + turn.lead)} + ({content}) + "
      f"{text(at_once(turn.after) + at_once(turn.gap))} }}}}"
      for i, (role, turn) in enumerate(form.turns.items())
    )
    answer = at_once(form.turns["assistant"].before)
    return (
      f"{folded}{{{{ {text(at_once(form.begin))} }}}}{{% for message in messages %}}{turns}"
      "{% else %}{{ raise_exception('no place for a message of role ' + message['role']) }}"
      "{% endif %}{% endfor %}{% if add_generation_prompt %}"
      f"{{{{ {text(answer)} }}}}{{% endif %}}"
    )

  def _parse(self, text: str, trained: bool = False) -> list[Piece]:
    """Cuts a string of the format at its special tokens."""
    return [
      Piece(self._ends.get(string, string), trained, bool(self._split.fullmatch(string)))
      for string in self._split.split(text)
      if string
    ]

  def _folded(self, messages: Sequence[Message]) -> Sequence[Message]:
    """Moves a leading system message into the first user message if the format requires it."""
    form = self._format
    assert form is not None
    if form.system is None or not messages or messages[0]["role"] != "system":
      return messages
    if len(messages) < 2 or messages[1]["role"] != "user":
      raise UserError(
        f"the chat template {self.name!r} puts a system message in front of a "
        "user's; there is none after it"
      )
    system, user = (m["content"].strip() if form.trim else m["content"] for m in messages[:2])
    return [{"role": "user", "content": form.system.replace("{}", system, 1) + user}, *messages[2:]]


# Two turns that end, in some templates, with different special tokens.
_PROBES: tuple[Message, ...] = (
  {"role": "assistant", "content": "b"},
  {
    "role": "assistant",
    "content": "",
    "tool_calls": [
      {
        "id": "callabcde",
        "type": "function",
        "function": {"name": "f", "arguments": {"x": "y"}},
      }
    ],
  },
)


def last_turn(messages: Sequence[Message]) -> list[Message]:
  """Gives weight 0 to all answers but the last turn's: those after the last message of a user."""
  users = [i for i, message in enumerate(messages) if message["role"] == "user"]
  last = users[-1] if users else -1
  return [
    {**message, "weight": 0} if message["role"] == "assistant" and i < last else message
    for i, message in enumerate(messages)
  ]


def _checked(message: Any) -> Message:
  """A message in the form that `Template` takes. Fields without a value are left out."""
  if problem := messages_lib.problem(message):
    raise UserError(
      f"a chat message is {message!r:.200}, not {{'role': …, 'content': …}} ({problem}); "
      "name the columns with --field"
    )
  return {key: value for key, value in message.items() if value is not None}


def _plain(message: Message, template: str) -> Message:
  """A message with a string as content, for a template that knows no other fields."""
  more = [key for key in messages_lib.SAID if message.get(key)]
  if more:
    raise _no_place(template, more[0])
  return {**message, "content": messages_lib.text(message)}


def _no_place(template: str, what: str) -> UserError:
  return UserError(
    f"the chat template {template!r} has no place for {what}; leave them out of the data, or take "
    f"a tokenizer whose own template has, with --template={OWN}"
  )


def _cut(rendered: jinja_template.Rendered) -> list[Piece]:
  """Cuts a text at its special tokens and at the ends of the learned ranges."""
  text, marks, learned = rendered
  edges = sorted({0, len(text), *(x for span in (*marks, *learned) for x in span)})
  specials = set(marks)
  return [
    Piece(text[a:b], any(s <= a and b <= e for s, e in learned), (a, b) in specials)
    for a, b in itertools.pairwise(edges)
  ]


def joined(pieces: Iterable[Piece]) -> list[Piece]:
  """Drops empty pieces and joins neighbours of the same kind, which are tokenized together."""
  out: list[Piece] = []
  for piece in pieces:
    if not piece.text:
      continue
    if out and not (piece.special or out[-1].special) and piece.trained == out[-1].trained:
      out[-1] = out[-1]._replace(text=out[-1].text + piece.text)
    else:
      out.append(piece)
  return out


def load(
  name: str,
  tokenizer: Tokenizer,
  source: str | None = None,
  variables: Mapping[str, Any] | None = None,
  last_turn: bool = False,
) -> Template:
  """Finds a template for a tokenizer.

  Args:
    name: A key of `FORMATS`, or 'tokenizer' for the Jinja template that came with it. '' chooses
      that one if it exists, else the first of simple, chatml, llama3 and gemma whose marks the
      tokenizer has, else raw.
    tokenizer: The tokenizer.
    source: Jinja source to take for 'tokenizer' instead of the tokenizer's own.
    variables: Variables of the template 'tokenizer' for all conversations that do not set them.
    last_turn: Only the assistant's messages after the last one of a user are learned.

  Raises:
    UserError: The template doesn't exist or does not read a variable, the tokenizer lacks its
      marks, or jinja2 is missing.
  """
  specials = tokenizer.special_ids
  if not name:
    fits = [
      key for key in FORMATS if FORMATS[key].marks and specials.keys() >= {*FORMATS[key].marks}
    ]
    name = OWN if tokenizer.chat_template else fits[0] if fits else "raw"
  if name == OWN:
    if not (source or tokenizer.chat_template):
      raise UserError("the tokenizer came with no chat template; choose another one")
    jinja_compile.check(source or tokenizer.chat_template or "", variables)
    if tokenizer.tool_template and not source:
      jinja_compile.check(tokenizer.tool_template)
  elif name not in FORMATS:
    raise UserError(
      f"there is no chat template {name!r}; choose one of {OWN}, {', '.join(FORMATS)}"
    )
  elif missing := [mark for mark in FORMATS[name].marks if mark not in specials]:
    raise UserError(
      f"the chat template {name!r} needs {', '.join(missing)}, which this tokenizer "
      "does not have as special tokens; choose another template, such as raw"
    )
  if variables and name != OWN:
    raise _no_place(name, f"the variable {min(variables)!r}")
  return Template(name, tokenizer, source if name == OWN else None, variables, last_turn)
