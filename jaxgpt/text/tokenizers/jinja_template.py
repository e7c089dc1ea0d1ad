"""The Jinja chat template that came with a tokenizer: rendered as transformers does, then cut."""

import datetime
import functools
import itertools
import json
import re

from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers.examples import Piece

_HELD = re.compile("\ue000([0-9]+)\ue001")  # stands for a content while the template is rendered
# A block that some templates mark what the assistant says with; it renders as what is in it.
_GENERATION = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")


def check(tokenizer):
  """Raises a UserError where a tokenizer's template is missing or can't be used."""
  if not tokenizer.chat_template:
    raise UserError("the tokenizer came with no chat template; choose another one")
  _compiled(tokenizer.chat_template)


@functools.lru_cache(maxsize=8)
def _compiled(source):
  try:
    import jinja2
    import jinja2.sandbox
  except ImportError as e:
    raise UserError(
      "the tokenizer's own chat template needs jinja2: pip install 'jaxgpt[data]'"
    ) from e

  def fail(message):
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

  def render(messages, generate, **values):
    try:
      return template.render(
        messages=messages, add_generation_prompt=generate, tools=None, documents=None, **values
      )
    except jinja2.exceptions.TemplateError as e:
      raise UserError(f"the tokenizer's chat template refuses a conversation: {e}") from e

  return render


def pieces(tokenizer, ends, messages, generate):
  """The pieces of a conversation.

  Contents are told from the template's own text by rendering it a second time with place holders
  for them. An assistant's turn is learned from where the template would have it begin up to the
  special token that ends it.

  Args:
    tokenizer: one with a chat_template.
    ends: {'{bos}': name, '{eos}': name} of its special tokens.
    messages, generate: as in `chat.Template`, with contents that are strings.

  Raises:
    UserError: jinja2 is not installed, the template refuses the messages, or it rewrites contents
      among which there are names of special tokens.
  """
  values = {"bos_token": ends["{bos}"], "eos_token": ends["{eos}"]}
  source = _compiled(tokenizer.chat_template)

  def render(messages, generate=False):
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


def _contents(render, messages, generate, whole):
  """{message: [(start, end) in `whole`]} of the contents; None where the template rewrites them."""
  held = render([{**m, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)], generate)
  for trim in (False, True):
    spans, parts, at = {}, [], 0
    for number, part in enumerate(_HELD.split(held)):
      if number % 2:
        i, part = int(part), messages[int(part)]["content"]
        part = part.strip() if trim else part
        spans.setdefault(i, []).append((at, at + len(part)))
      parts.append(part)
      at += len(part)
    if "".join(parts) == whole:
      return spans
  return None


def _answer(render, messages, i, whole, content, marks):
  """(start, end) in `whole` of what is learned of assistant's message `i`, or None."""
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


def _cut(text, marks, trained):
  """Pieces of a text: cut at its special tokens and where what is learned begins and ends."""
  edges = sorted({0, len(text), *(x for span in (*marks, *trained) for x in span)})
  specials = set(marks)
  return [
    Piece(text[a:b], any(s <= a and b <= e for s, e in trained), (a, b) in specials)
    for a, b in itertools.pairwise(edges)
  ]
