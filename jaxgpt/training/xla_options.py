"""Options of XLA that the train step is compiled with: one table by kind of device.

`train` and `plan` compile with the same ones; what each is worth is in docs/log.md.
"""

import jax

from jaxgpt.errors import UserError

# How much of a core's fast memory a fused matmul may take for its tiles. libtpu's own choice leaves the
# matmuls of a large model at two thirds of the peak.
_VMEM = "xla_tpu_scoped_vmem_limit_kib"
# From how many MiB on a matmul beside a gather of mesh.tensor is cut into a loop of narrow ones, which
# take two to four times as long as the wide one and its gather: never.
_TENSOR = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
DEFAULTS = {  # by the name that JAX gives a device
  "TPU v4": _TENSOR,
  "TPU v5": _TENSOR | {_VMEM: "65536"},  # v5p
  "TPU v5p": _TENSOR | {_VMEM: "65536"},
  "TPU v5 lite": _TENSOR | {_VMEM: "65536"},  # v5e
  "TPU v6 lite": _TENSOR | {_VMEM: "98304"},  # v6e
  "TPU7x": _TENSOR | {_VMEM: "65536"},
}


def options(device_kind, given=()):
  """What to compile with: {name: value}.

  Args:
    device_kind: of a device, such as 'TPU v5 lite'.
    given: the config's `mesh.compiler_options`, each "name=value"; they win over the table.
  """
  return DEFAULTS.get(device_kind, {}) | dict(option.split("=", 1) for option in given)


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
