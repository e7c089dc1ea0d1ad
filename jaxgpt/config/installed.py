"""Versions of installed packages."""

import importlib.metadata


def version(name: str) -> str | None:
  """The installed version of a package, or None if it is not installed."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None
