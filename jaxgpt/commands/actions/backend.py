"""Starting JAX for a command."""

import logging as python_logging
import sys
from typing import Any

from absl import logging

from jaxgpt.parallel import mesh


def start(several: bool = False) -> None:
  """Prepares JAX's backend. Call it before the first use of a device.

  Args:
    several: Whether this process is about to join others.
  """
  logging.set_verbosity(logging.ERROR)  # the commands report what a user can act on themselves
  logging.get_absl_logger().addFilter(_is_not_of_orbax)
  if sys.unraisablehook is sys.__unraisablehook__:
    sys.unraisablehook = _unraisable
  mesh.prepare_cpu(several)


def _is_not_of_orbax(record: python_logging.LogRecord) -> bool:
  """False for Orbax's records of a failed save: with pages of traceback. It is raised as well."""
  return "orbax" not in record.pathname


def _unraisable(found: Any) -> None:
  """Leaves out the callbacks of a save that has failed, which find its event loop closed."""
  if not isinstance(found.exc_value, RuntimeError) or "loop is closed" not in str(found.exc_value):
    sys.__unraisablehook__(found)
