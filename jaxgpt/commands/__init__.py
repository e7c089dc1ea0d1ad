"""The commands of `jaxgpt`: one file each, found by listing this folder.

A command's file defines `COMMAND`. It imports little at the top, and the rest inside `run`, so that
`jaxgpt --help` answers at once. Work that needs heavy imports is in `actions` and `checks`.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

_OTHERS = ("main", "reference")  # modules of this folder that hold no command


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
  found = [
    importlib.import_module(f"{__name__}.{module.name}").COMMAND
    for module in pkgutil.iter_modules(__path__)
    if not module.ispkg and module.name not in _OTHERS
  ]
  return {command.name: command for command in sorted(found, key=lambda command: command.name)}
