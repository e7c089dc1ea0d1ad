"""Compiled Jinja chat templates: as they are, and with private characters around turns.

`jinja_template` runs them. The variables that a template reads are found here.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxgpt.errors import UserError

_OPEN, _CLOSE = "\U000f0000", "\U000f0001"
EVENT = re.compile(f"{_OPEN}(?:([TE])([0-9]+):([0-9]*)|([GP])([+-]))?{_CLOSE}")

# Variables that `render` sets itself.
_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "_turn"}) | {
  f"{role}_token" for role in ("bos", "eos", "pad", "mask", "unk", "sep", "cls")
}


def check(source: str, variables: Iterable[str] | None = None) -> None:
  """Raises a UserError if a template can't be used, or does not read one of the variables."""
  reads = compiled(source).reads
  for name in variables or ():
    if name in _OURS:
      raise UserError(f"the template variable {name!r} is set by jaxgpt; leave it out")
    if name not in reads:
      there = ", ".join(sorted(reads - _OURS)) or "none"
      raise UserError(
        f"the tokenizer's chat template does not read the variable {name!r}; it reads: {there}"
      )


def assignments(variables: Mapping[str, Any]) -> str:
  """Jinja source that sets variables unless a conversation does, to put in front of a template."""
  if not variables:
    return ""
  sets = (
    f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
    for name, value in variables.items()
  )
  # The newline ends a block tag, so it is not written, and the template begins a line as before.
  return "".join(sets) + "\n"


def _literal(value: Any) -> str:
  """A JSON value in Jinja's syntax, whose names of constants may be those of JSON except null."""
  if isinstance(value, list):
    return f"[{', '.join(map(_literal, value))}]"
  if isinstance(value, dict):
    return "{" + ", ".join(f"{json.dumps(k)}: {_literal(v)}" for k, v in value.items()) + "}"
  return "none" if value is None else json.dumps(value, ensure_ascii=False)


class Template(NamedTuple):
  """A compiled template: as it is, and with the private characters.

  Attributes:
    plain, marked: The two.
    features: 'generation', if it has that tag.
    reads: Names of the variables that it reads.
  """

  plain: Any
  marked: Any
  features: frozenset[str]
  reads: frozenset[str]


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> Template:
  try:
    import jinja2
    import jinja2.ext
    import jinja2.meta
    import jinja2.nodes as nodes
    import jinja2.sandbox
  except ImportError as e:
    raise UserError(
      "the tokenizer's own chat template needs jinja2: pip install 'jaxgpt[data]'"
    ) from e
  features = set()

  class Generation(jinja2.ext.Extension):
    """The tag {% generation %} … {% endgeneration %} of transformers."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno
      features.add("generation")
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      events = (event("G+"), event("G-")) if self.environment.globals["_marked"] else ("", "")
      call = self.call_method("_wrap", [nodes.Const(event) for event in events])
      return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _wrap(self, before: str, after: str, caller: Callable[[], str]) -> str:
      return before + caller() + after

  reads = set[str]()

  def compile_(marked: bool) -> Any:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _to_json
    env.globals.update(
      raise_exception=functools.partial(_fail, jinja2.exceptions.TemplateError),
      strftime_now=_strftime_now,
      _marked=marked,
    )
    tree = env.parse(source)
    reads.update(jinja2.meta.find_undeclared_variables(tree) - env.globals.keys())
    return env.from_string(_with_turns(tree, nodes) if marked else tree)

  try:
    return Template(compile_(False), compile_(True), frozenset(features), frozenset(reads))
  except jinja2.exceptions.TemplateError as e:
    raise UserError(f"the tokenizer's chat template can't be used ({e}); choose another one") from e


def _to_json(
  x: Any,
  ensure_ascii: bool = False,
  indent: int | str | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """The filter `tojson` as transformers has it: jinja2's own escapes HTML."""
  return json.dumps(
    x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _strftime_now(form: str) -> str:
  return datetime.datetime.now().strftime(form)


def _fail(error: type[Exception], message: str) -> None:
  raise error(message)


def event(text: str) -> str:
  return f"{_OPEN}{text}{_CLOSE}"


def _with_turns(tree: Any, nodes: Any) -> Any:
  """Makes each loop over messages write where an iteration begins and where the loop ends.

  `_turn(loop, item)` writes nothing for an item that is not a message.
  """
  loops: dict[int, Any] = {}

  def output(line: int, *args: Any) -> Any:
    call = nodes.Call(nodes.Name("_turn", "load"), list(args), [], None, None)
    return nodes.Output([call]).set_lineno(line)

  for node in [tree, *tree.find_all(nodes.Node)]:
    for _, value in list(node.iter_fields()):
      if not isinstance(value, list):
        continue
      for i in reversed(range(len(value))):
        loop = value[i]
        if isinstance(loop, nodes.For) and isinstance(loop.target, nodes.Name):
          number = loops.setdefault(id(loop), len(loops))
          item = nodes.Name(loop.target.name, "load")
          loop.body.insert(0, output(loop.lineno, nodes.Const(number), item))
          end = output(loop.lineno, nodes.Const(number), nodes.Const(None))
          value.insert(i + 1, end)
  return tree
