"""What is installed."""

import importlib.metadata


def version(name):
  """The installed version of a package, or None."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None
