"""The commands of `jaxgpt`: one file each, found by listing this folder and its subfolders.

A command's file defines `COMMAND`. It imports little at the top, and the rest inside `run`, so that
`jaxgpt --help` answers at once. Work that needs heavy imports is in `actions` and `checks`.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_OTHERS = ("main", "reference", "actions", "checks")  # files and folders that hold no command


@dataclasses.dataclass(frozen=True)
class Command:
  """One command of the command line.

  Attributes:
    name: The word after `jaxgpt`, or two words such as 'data show'.
    summary: One phrase in lower case for `--help`.
    options: A dataclass whose fields are declared with `jaxgpt.config.options.option`.
    run: Runs the command with an instance of `options`. Returns the exit code. None is 0.
  """

  name: str
  summary: str
  options: type
  run: Callable[[Any], int | None]


def discover() -> dict[str, Command]:
  """All commands by name, in alphabetical order."""
  found = _commands(__name__, __path__)
  return {command.name: command for command in sorted(found, key=lambda command: command.name)}


def _commands(package: str, paths: Iterable[str]) -> Iterator[Command]:
  """The commands in a package and in the packages below it."""
  for module in pkgutil.iter_modules(paths):
    if module.name in _OTHERS:
      continue
    found = importlib.import_module(f"{package}.{module.name}")
    if module.ispkg:
      yield from _commands(found.__name__, found.__path__)
    else:
      yield found.COMMAND
