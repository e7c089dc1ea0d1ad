"""Functions of Python's standard library and the first lines of their docstrings.

A function is written as the words that it consists of: `def get_size(self, minWidth)` becomes
"def get size ( self , min width )". So a word is the same token in a name and in a summary. The
modules of a split are in no other split.

The training rows also come from the packages that jaxgpt itself needs, in the versions that are
installed. And they have a second task, from which a small model learns to copy words: rows whose
input begins with "name of" ask for the function's name. The other splits have none of these.
"""

import ast
import importlib.util
import pathlib
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxgpt.tasks.sample_data.grammar import Row

PACKAGES = ("absl", "etils", "flax", "grain", "jax", "numpy", "optax", "orbax", "rich", "scipy")
NAME_OF = "name of"  # begins the input of a row whose target is the function's name
_NAMES = 12_000  # such rows at most
_LEAST, _MOST = 3, 30  # words of a summary
_CHARACTERS = 120  # of a function
_NOT_MODULES = ("site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__")
_TOKEN = re.compile(r"[^\W\d]\w*|\d[\w.]*|[^\w\s]+")  # identifiers, numbers, signs
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_SENTENCE = re.compile(r".+?[.!?](?=\s|$)")


def words(source: str) -> str:
  """Source code as words, line by line.

  Example:
    >>> words("def getSize(self, _max_width=3):\\n  return HTTPError")
    'def get size ( self , max width = 3 ) :\\nreturn http error'
  """

  def split(token: str) -> str:
    return " ".join(_WORD.findall(token)).lower() if token.isascii() else token

  lines = []
  for line in source.splitlines():
    tokens = _TOKEN.findall(line)
    found = [split(token) if token[0].isidentifier() else token for token in tokens]
    lines.append(" ".join(text for text in found if text))
  return "\n".join(line for line in lines if line)


class _Function(NamedTuple):
  """A function in words: what it begins with, its source without docstring, and its summary.

  `source` and `summary` are empty if it has no docstring that can be one.
  """

  signature: str
  name: str
  source: str = ""
  summary: str = ""


def _functions(path: pathlib.Path) -> Iterator[_Function]:
  """Yields the functions of a file."""
  try:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
  except (OSError, SyntaxError, ValueError):
    return
  for node in ast.walk(tree):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      continue
    signature = words(f"def {node.name}({ast.unparse(node.args)}):")
    found = _Function(_cut(signature), words(node.name))
    summary = _summary(ast.get_docstring(node) or "")
    if summary and len(node.body) > 1:
      node.body = node.body[1:]
      node.decorator_list = []
      found = found._replace(source=_cut(words(ast.unparse(node))), summary=summary)
    yield found


def _summary(doc: str) -> str:
  """The first paragraph of a docstring, or its first sentence if that is long. '' without one."""
  summary = " ".join(doc.split("\n\n")[0].split())
  if len(summary.split()) > _MOST and (first := _SENTENCE.match(summary)):
    summary = first[0]
  return summary if _LEAST <= len(summary.split()) <= _MOST and summary.isascii() else ""


def _cut(source: str) -> str:
  """The beginning of a function, in whole words."""
  return source if len(source) <= _CHARACTERS else source[:_CHARACTERS].rsplit(" ", 1)[0]


def _files(roots: Sequence[pathlib.Path]) -> list[tuple[str, pathlib.Path]]:
  """(module, file) of the Python files below folders, without tests."""
  return sorted(
    (path.relative_to(root).parts[0], path)
    for root in roots
    for path in root.rglob("*.py")
    if not set(_NOT_MODULES) & set(path.relative_to(root).parts)
  )


def _installed(names: Sequence[str]) -> list[pathlib.Path]:
  """The folders of those packages that are installed."""
  specs = [importlib.util.find_spec(name) for name in names]
  return [pathlib.Path(at) for s in specs if s for at in s.submodule_search_locations or ()]


def make(rng: random.Random, split: str, count: int) -> list[Row]:
  """Rows of kind seq2seq: a function and its summary. At most as many as there are."""
  files = _files([pathlib.Path(sysconfig.get_paths()["stdlib"])])
  # A package is one module: its files share words.
  modules = sorted({module for module, _ in files})
  random.Random("modules").shuffle(modules)
  test, validation = len(modules) // 9, len(modules) // 30
  chosen = {
    "test": set(modules[:test]),
    "validation": set(modules[test : test + validation]),
    "train": set(modules[test + validation :]),
  }[split]
  paths = [path for module, path in files if module in chosen]
  seen = set[str]()
  if split == "train":
    paths += [path for _, path in _files(_installed(PACKAGES))]
    # A module may copy a function of another one, or its docstring.
    for module, path in files:
      if module not in chosen:
        seen.update(text for f in _functions(path) if f.source for text in (f.source, f.summary))
  rows, names = list[Row](), dict[str, Row]()
  for path in paths:
    for f in _functions(path):
      if f.source and f.source not in seen and f.summary not in seen:
        seen |= {f.source, f.summary}
        rows.append({"input": f.source, "target": f.summary})
      if " " in f.name:
        names.setdefault(f.name, {"input": f"{NAME_OF} {f.signature}", "target": f.name})
  if split == "train":
    chosen_names = rng.sample(sorted(names), min(_NAMES, len(names)))
    rows += [names[name] for name in chosen_names]
  rng.shuffle(rows)
  return rows[:count]
