"""XLA options of the programs: those of the chip (`parallel.chips`) and of the config.

`train` and `plan` compile the train step with the same options. All other programs with attention
kernels need the chip's too: the kernels' blocks fill more VMEM than libtpu grants by default.
"""

from collections.abc import Iterable

import jax
from jax.sharding import Mesh

from jaxgpt.errors import UserError, first_line
from jaxgpt.parallel import chips


def options(device_kind: str, given: Iterable[str] = ()) -> dict[str, str | bool]:
  """XLA options to compile with, as {name: value}.

  Args:
    device_kind: From `jax.Device.device_kind`, such as 'TPU v5 lite'.
    given: The config's `mesh.compiler_options`, each "name=value". They override the chip's.
  """
  chip = chips.of_device(device_kind)
  defaults: dict[str, str | bool] = dict(chip.xla_options) if chip else {}
  for option in given:
    name, _, value = option.partition("=")
    defaults[name] = value
  return defaults


def of_mesh(mesh: Mesh, given: Iterable[str] = ()) -> dict[str, str | bool] | None:
  """The options for `jax.jit(…, compiler_options=…)` on a mesh, or None if there are none.

  Args:
    mesh: The mesh of the devices to compile for.
    given: As in `options`. Leave it out where a run may be on other devices than it was trained on.
  """
  return options(mesh.devices.flat[0].device_kind, given) or None


def compile(
  lowered: jax.stages.Lowered, mesh: Mesh, given: Iterable[str] = ()
) -> jax.stages.Compiled:
  """Compiles a lowered function.

  Args:
    lowered: From the `lower` method of a jitted function.
    mesh: The mesh of the devices to compile for.
    given: As in `options`.

  Raises:
    UserError: XLA does not know an option, or not for these devices.
    jax.errors.JaxRuntimeError: XLA refuses for another reason, such as too little memory.
  """
  try:
    return lowered.compile(options(mesh.devices.flat[0].device_kind, given))
  except jax.errors.JaxRuntimeError as e:
    if not given or not str(e).startswith(("INVALID_ARGUMENT", "FAILED_PRECONDITION")):
      raise
    raise UserError(
      f"XLA refuses to compile with mesh.compiler_options={tuple(given)}: {first_line(e)}"
    ) from e
