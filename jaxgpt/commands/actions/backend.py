"""Starting JAX for a command."""

from absl import logging

from jaxgpt.parallel import mesh


def start(several: bool = False) -> None:
  """Prepares JAX's backend. Call it before the first use of a device.

  Args:
    several: Whether this process is about to join others.
  """
  logging.set_verbosity(logging.ERROR)  # the commands report what a user can act on themselves
  mesh.prepare_cpu(several)
