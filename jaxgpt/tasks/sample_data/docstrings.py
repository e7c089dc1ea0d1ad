"""Functions of Python's standard library and the first lines of their docstrings.

The modules of a split are in no other split.
"""

import ast
import pathlib
import random
import sysconfig
from collections.abc import Iterator

from jaxgpt.tasks.sample_data.grammar import Row

_LEAST, _MOST = 3, 30  # words of a summary
_CHARACTERS = 400  # of a function
_NOT_MODULES = ("site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__")


def _functions(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yields (source without docstring, first sentence of the docstring) of a file's functions."""
  try:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
  except (OSError, SyntaxError, ValueError):
    return
  for node in ast.walk(tree):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
      continue
    doc = ast.get_docstring(node)
    if not doc:
      continue
    summary = " ".join(doc.split("\n\n")[0].split())
    node.body = node.body[1:]
    node.decorator_list = []
    yield ast.unparse(node), summary


def make(rng: random.Random, split: str, count: int) -> list[Row]:
  """Rows of kind seq2seq: a function and its summary. At most as many as there are."""
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  paths = sorted(
    path for path in root.rglob("*.py") if not set(_NOT_MODULES) & set(path.relative_to(root).parts)
  )
  # A package is one module: its files share words.
  modules = sorted({path.relative_to(root).parts[0] for path in paths})
  random.Random("modules").shuffle(modules)
  test, validation = len(modules) // 9, len(modules) // 30
  chosen = {
    "test": modules[:test],
    "validation": modules[test : test + validation],
    "train": modules[test + validation :],
  }[split]
  found: dict[str, Row] = {}
  for path in paths:
    if path.relative_to(root).parts[0] not in chosen:
      continue
    for source, summary in _functions(path):
      if _LEAST <= len(summary.split()) <= _MOST and summary.isascii():
        row: Row = {"input": source[:_CHARACTERS], "target": summary}
        found.setdefault(summary, row)
  rows = list(found.values())
  rng.shuffle(rows)
  return rows[:count]
