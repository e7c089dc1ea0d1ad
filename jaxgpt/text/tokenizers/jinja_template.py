"""Jinja chat templates of tokenizers: rendered as in transformers, then cut into pieces."""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers.base import Tokenizer
from jaxgpt.text.tokenizers.examples import Message, Piece

Range: TypeAlias = tuple[int, int]  # (start, end) in a rendered conversation

_HELD = re.compile(
  "\ue000([0-9]+)\ue001"
)  # placeholder of a content while the template is rendered
# Some templates mark the assistant's text with a generation block; it renders as its content.
_GENERATION = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")


def check(tokenizer: Tokenizer) -> None:
  """Raises a UserError if a tokenizer's template is missing or can't be used."""
  if not tokenizer.chat_template:
    raise UserError("the tokenizer came with no chat template; choose another one")
  _compiled(tokenizer.chat_template)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Callable[..., str]:
  try:
    import jinja2
    import jinja2.sandbox
  except ImportError as e:
    raise UserError(
      "the tokenizer's own chat template needs jinja2: pip install 'jaxgpt[data]'"
    ) from e

  def fail(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)

  env = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
  )
  env.filters["tojson"] = lambda x, **how: json.dumps(x, ensure_ascii=False, **how)
  env.globals.update(
    raise_exception=fail, strftime_now=lambda form: datetime.datetime.now().strftime(form)
  )
  source = _GENERATION.sub(lambda m: m[1] + ("endif" if m[2] else "if true") + m[3], source)
  try:
    template = env.from_string(source)
  except jinja2.exceptions.TemplateError as e:
    raise UserError(f"the tokenizer's chat template can't be used ({e}); choose another one") from e

  def render(messages: Sequence[Message], generate: bool, **values: str) -> str:
    try:
      return template.render(
        messages=messages, add_generation_prompt=generate, tools=None, documents=None, **values
      )
    except jinja2.exceptions.TemplateError as e:
      raise UserError(f"the tokenizer's chat template refuses a conversation: {e}") from e

  return render


def pieces(
  tokenizer: Tokenizer, ends: Mapping[str, str], messages: Sequence[Message], generate: bool
) -> list[Piece]:
  """Writes a conversation as pieces.

  A second rendering with placeholders for the contents tells the contents from the template's own
  text. An assistant's turn is trained on from the place where the template would start generation
  up to the special token that ends it.

  Args:
    tokenizer: A tokenizer with a chat_template.
    ends: {'{bos}': name, '{eos}': name} of its special tokens.
    messages: See `chat_template.Template`. Contents must be strings.
    generate: See `chat_template.Template`.

  Raises:
    UserError: jinja2 is not installed, the template refuses the messages, or it rewrites contents
      with names of special tokens.
  """
  values = {"bos_token": ends["{bos}"], "eos_token": ends["{eos}"]}
  source = _compiled(tokenizer.chat_template or "")

  def render(messages: Sequence[Message], generate: bool = False) -> str:
    return source(messages, generate, **values)

  whole = render(messages, generate)
  contents = _contents(render, messages, generate, whole)
  names = sorted(tokenizer.special_ids, key=len, reverse=True)
  pattern = re.compile("|".join(map(re.escape, names)))
  if contents is None:
    bad = next((name for m in messages for name in names if name in m["content"]), None)
    if bad:
      raise UserError(
        f"the tokenizer's chat template rewrites a message that holds {bad!r}, the "
        "name of a special token; choose another template"
      )
    contents = {}
  inside = [span for spans in contents.values() for span in spans]
  marks = [
    m.span()
    for m in pattern.finditer(whole)
    if not any(a < m.end() and m.start() < b for a, b in inside)
  ]
  trained = [
    _answer(render, messages, i, whole, contents.get(i), marks)
    for i, m in enumerate(messages)
    if m["role"] == "assistant" and m.get("weight", 1)
  ]
  return _cut(whole, marks, [*filter(None, trained)])


def _contents(
  render: Callable[..., str], messages: Sequence[Message], generate: bool, whole: str
) -> dict[int, list[Range]] | None:
  """{message: ranges of its content in `whole`}, or None if the template rewrites contents."""
  held = render([{**m, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)], generate)
  for trim in (False, True):
    spans: dict[int, list[Range]] = {}
    strings, at = list[str](), 0
    for number, string in enumerate(_HELD.split(held)):
      if number % 2:
        i, string = int(string), messages[int(string)]["content"]
        string = string.strip() if trim else string
        spans.setdefault(i, []).append((at, at + len(string)))
      strings.append(string)
      at += len(string)
    if "".join(strings) == whole:
      return spans
  return None


def _answer(
  render: Callable[..., str],
  messages: Sequence[Message],
  i: int,
  whole: str,
  content: Sequence[Range] | None,
  marks: Iterable[Range],
) -> Range:
  """The range in `whole` of the assistant's message `i` that is trained on."""
  before = render(messages[:i], True) if i else None
  begins = before is not None and whole.startswith(before) and len(before)
  if content:
    start = begins if begins and begins <= content[0][0] else content[0][0]
  elif begins:
    start = begins
  else:
    raise UserError(
      "the tokenizer's chat template does not say where an answer begins; choose another template"
    )
  return start, next((end for first, end in marks if first >= start), len(whole))


def _cut(text: str, marks: Sequence[Range], trained: Sequence[Range]) -> list[Piece]:
  """Cuts a text at its special tokens and at the ends of the trained ranges."""
  edges = sorted({0, len(text), *(x for span in (*marks, *trained) for x in span)})
  specials = set(marks)
  return [
    Piece(text[a:b], any(s <= a and b <= e for s, e in trained), (a, b) in specials)
    for a, b in itertools.pairwise(edges)
  ]
