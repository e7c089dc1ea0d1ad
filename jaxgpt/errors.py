"""The one exception that a user sees as a message instead of a traceback."""


class UserError(ValueError):
  """A bad input: a file, a config key, a checkpoint or a mesh.

  The message names the thing, its value and the way out. The command line prints it and exits
  with code 2; anything else that is raised is a bug and keeps its traceback.
  """
