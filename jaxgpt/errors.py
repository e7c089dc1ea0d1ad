"""The one exception that a user sees as a message instead of a traceback."""

import importlib


class UserError(ValueError):
  """A bad input: a file, a config key, a checkpoint or a mesh.

  The message names the thing, its value and the way out. The command line prints it and exits
  with `exit_code`: 2, or 75 where the same command may work later. Anything else that is raised is
  a bug and keeps its traceback.
  """

  def __init__(self, message, exit_code=2):
    super().__init__(message)
    self.exit_code = exit_code


def optional(module, extra, what):
  """An optional dependency's module, imported now.

  Args:
    module: its dotted name.
    extra: the extra of this package that installs it.
    what: what can't be done without it, as the message begins.

  Raises:
    UserError: it isn't installed; the message names the extra.
  """
  try:
    return importlib.import_module(module)
  except ImportError as e:
    raise UserError(
      f"{what} needs {e.name or module}, which is not installed: pip install 'jaxgpt[{extra}]'"
    ) from e
