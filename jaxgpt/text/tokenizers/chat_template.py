"""Chat templates: the messages of a conversation as pieces of text, special tokens and roles.

A template is data (`FORMATS`), or the Jinja source that came with a tokenizer. What users write is
always a piece of plain text: no message can smuggle in the mark that ends its turn.
"""

import re
from typing import NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers import jinja_template
from jaxgpt.text.tokenizers.examples import Piece

OWN = "tokenizer"  # the Jinja template that came with the tokenizer


class Turn(NamedTuple):
  """How a message is written: before, lead, content, after, gap.

  Of an assistant's message, lead, content and after are what is learned and what is generated
  following `before`.
  """

  before: str = ""
  after: str = ""
  gap: str = ""
  lead: str = ""


class Format(NamedTuple):
  """A chat template. Its strings may hold its marks, and {bos} and {eos} for the tokenizer's.

  Attributes:
    turns: {role: Turn}.
    marks: special tokens that the tokenizer must have.
    begin: what a conversation begins with.
    system: where no turn has that role: how a system message, {}, is put in front of the first
      user's message.
    trim: whether white space around a content is left out.
  """

  turns: dict
  marks: tuple = ()
  begin: str = "{bos}"
  system: str | None = None
  trim: bool = False


def _turns(before, after, gap="", **names):
  """The same turn for each role, with the name that the format has for it."""
  names = dict(system="system", user="user", assistant="assistant") | names
  return {
    role: Turn(before.replace("{role}", name), after, gap) for role, name in names.items() if name
  }


FORMATS = {
  # The marks that each tokenizer trained here has.
  "simple": Format(
    _turns("<|{role}|>", "<|end|>"), ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
  ),
  # No marks: for tokenizers without any. A line feed ends a question, eos an answer.
  "raw": Format(
    {
      "system": Turn(after="\n"),
      "user": Turn(after="\n"),
      "assistant": Turn(after="{eos}", gap="\n"),
    }
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
  """Messages to pieces, for one tokenizer. Picklable.

  Attributes:
    name: 'tokenizer' or one of `FORMATS`.
    stop: name of the special token that ends an assistant's turn, or None where only Jinja knows.
  """

  def __init__(self, name, tokenizer):
    """Use `load`."""
    self.name, self._tokenizer = name, tokenizer
    ids = {i: token for token, i in tokenizer.special_ids.items()}
    self._ends = {"{bos}": ids[tokenizer.bos_id], "{eos}": ids[tokenizer.eos_id]}
    self._format = FORMATS.get(name)
    self.stop = None
    if self._format:
      names = [*self._format.marks, *self._ends]
      self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")")
      self.stop = next(
        p.text for p in self._parse(self._format.turns["assistant"].after) if p.special
      )

  def __call__(self, messages, generate=False):
    """The pieces of a conversation, all of its special tokens among them.

    Args:
      messages: [{'role': str, 'content': str}, …]; a content may also be a list of {'type':
        'text', 'text': str}. An assistant's message with a 'weight' of 0 is not learned.
      generate: end with what stands before an assistant's answer.

    Returns:
      A list of `examples.Piece`, no two neighbours of which could be one.

    Raises:
      UserError: a message has no such form, or a role that the template has no place for.
    """
    messages = [_checked(message) for message in messages]
    if not self._format:
      return joined(jinja_template.pieces(self._tokenizer, self._ends, messages, generate))
    form, pieces = self._format, []
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

  def _parse(self, text, trained=False):
    parts = [part for part in self._split.split(text) if part]
    return [
      Piece(self._ends.get(part, part), trained, bool(self._split.fullmatch(part)))
      for part in parts
    ]

  def _folded(self, messages):
    """The messages with a leading system message put into the user's first."""
    form = self._format
    if form.system is None or not messages or messages[0]["role"] != "system":
      return messages
    if len(messages) < 2 or messages[1]["role"] != "user":
      raise UserError(
        f"the chat template {self.name!r} puts a system message in front of a "
        "user's; there is none after it"
      )
    system, user = (m["content"].strip() if form.trim else m["content"] for m in messages[:2])
    return [{"role": "user", "content": form.system.replace("{}", system, 1) + user}, *messages[2:]]


def _checked(message):
  """A message whose content is a string."""
  try:
    role, content = message["role"], message["content"]
    if isinstance(content, list):
      content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
      raise TypeError("role and content must be strings")
  except (KeyError, TypeError, IndexError) as e:
    raise UserError(
      f"a chat message is {message!r:.200}, not {{'role': …, 'content': …}} "
      f"({type(e).__name__}: {e}); name the columns with --field"
    ) from e
  return {**message, "role": role, "content": content}


def joined(pieces):
  """Pieces without empty ones, and with neighbours of one kind joined, as a tokenizer sees them."""
  out = []
  for piece in pieces:
    if not piece.text:
      continue
    if out and not (piece.special or out[-1].special) and piece.trained == out[-1].trained:
      out[-1] = out[-1]._replace(text=out[-1].text + piece.text)
    else:
      out.append(piece)
  return out


def load(name, tokenizer) -> Template:
  """A template for a tokenizer.

  Args:
    name: one of `FORMATS`; 'tokenizer': the Jinja template that came with it; '': that one where
      there is one, else the first of simple, chatml, llama3 and gemma whose marks it has, else raw.
    tokenizer: from `tokenizer.load`.

  Raises:
    UserError: no such template, the tokenizer lacks its marks, or jinja2 is not installed.
  """
  specials = tokenizer.special_ids
  if not name:
    fits = [
      key for key in FORMATS if FORMATS[key].marks and specials.keys() >= {*FORMATS[key].marks}
    ]
    name = OWN if tokenizer.chat_template else fits[0] if fits else "raw"
  if name == OWN:
    jinja_template.check(tokenizer)
  elif name not in FORMATS:
    raise UserError(
      f"there is no chat template {name!r}; choose one of {OWN}, {', '.join(FORMATS)}"
    )
  elif missing := [mark for mark in FORMATS[name].marks if mark not in specials]:
    raise UserError(
      f"the chat template {name!r} needs {', '.join(missing)}, which this tokenizer "
      "does not have as special tokens; choose another template, such as raw"
    )
  return Template(name, tokenizer)
