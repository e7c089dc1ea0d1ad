"""User errors: the one exception that a user sees as a message and not as a traceback."""

import difflib
import importlib
import re
import types
from collections.abc import Iterable

EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later
# Control characters, line separators, marks that reverse the writing direction, lone surrogates.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
  """A bad input: a file, a config key, a checkpoint or a mesh.

  The message names the thing, its value and the way out. The command line prints it and exits with
  `exit_code`. Any other exception is a bug and keeps its traceback.

  Attributes:
    exit_code: 2, or `EXIT_AGAIN`.
  """

  def __init__(self, message: str, exit_code: int = 2):
    super().__init__(message)
    self.exit_code = exit_code


def printable(text: str, keep: str = "") -> str:
  """A text that is safe to print and can be encoded in UTF-8.

  The name of a file, or a text in it, may hold sequences that a terminal obeys. They are written as
  escapes of Python: '\\x1b[2J'.

  Args:
    text: The text.
    keep: Control characters to keep, such as a newline.
  """
  return _CONTROLS.sub(
    lambda found: (
      found[0] if found[0] in keep else found[0].encode("unicode_escape").decode("ascii")
    ),
    text,
  )


def nearest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str:
  """A hint such as "did you mean 'adamw'? ", or '' if no name is close.

  Args:
    name: The name that the user gave.
    names: The names that there are.
    cutoff: Least similarity, from 0 to 1.
  """
  close = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
  return f"did you mean {close[0]!r}? " if close else ""


def first_line(error: BaseException, limit: int | None = None) -> str:
  """The first line of an exception's message, or '?' if it has none.

  Args:
    error: The exception.
    limit: Length in characters after which the line is cut.
  """
  return (str(error).splitlines() or ["?"])[0][:limit]


def optional(module: str, extra: str, what: str) -> types.ModuleType:
  """Imports an optional dependency.

  Args:
    module: Dotted name of the module.
    extra: The extra of this package that installs it.
    what: The feature that needs it, the start of the error message.

  Raises:
    UserError: The module is not installed. The message names the extra.
  """
  try:
    return importlib.import_module(module)
  except ImportError as e:
    raise UserError(
      f"{what} needs {e.name or module}, which is not installed: pip install 'jaxgpt[{extra}]'"
    ) from e
