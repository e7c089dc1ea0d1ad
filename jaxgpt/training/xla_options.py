"""XLA options of the train step: those of the chip (`parallel.chips`) and of the config.

`train` and `plan` compile with the same options.
"""

import jax

from jaxgpt.errors import UserError
from jaxgpt.parallel import chips


def options(device_kind, given=()):
  """XLA options to compile with, as {name: value}.

  Args:
    device_kind: From `jax.Device.device_kind`, such as 'TPU v5 lite'.
    given: The config's `mesh.compiler_options`, each "name=value". They override the chip's.
  """
  chip = chips.of_device(device_kind)
  defaults = dict(chip.xla_options) if chip else {}
  return defaults | dict(option.split("=", 1) for option in given)


def compile(lowered, mesh, given=()):
  """A lowered function's executable.

  Args:
    lowered: from a jitted function's `lower`.
    mesh: of the devices that it is for.
    given: as in `options`.

  Raises:
    UserError: an option is unknown to XLA, or not for these devices.
    jax.errors.JaxRuntimeError: anything else that XLA refuses, such as too little memory.
  """
  try:
    return lowered.compile(options(mesh.devices.flat[0].device_kind, given))
  except jax.errors.JaxRuntimeError as e:
    if not given or not str(e).startswith(("INVALID_ARGUMENT", "FAILED_PRECONDITION")):
      raise
    raise UserError(
      f"XLA refuses to compile with mesh.compiler_options={tuple(given)}: {str(e).splitlines()[0]}"
    ) from e
