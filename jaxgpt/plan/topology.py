"""Topologies: from a name such as `v5e-256` to devices that can be compiled for, and their mesh."""

import math
import re
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.experimental import topologies

from jaxgpt.errors import UserError, first_line
from jaxgpt.parallel import chips
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.plan import gpu_target_config
from jaxgpt.plan.schedule import dump

_TPU_NAME = re.compile(
  r"(?P<chip>[a-z][a-z0-9]*)(-(?P<size>\d+)|:(?P<shape>\d+(x\d+)+))(?:x(?P<slices>\d+))?"
)
_GPU_NAME = re.compile(r"(?P<chip>[a-z]+\d+[a-z]*?)x(?P<size>\d+)(?:x(?P<hosts>\d+))?")
_HELP = (
  "write CHIP-SIZE such as v5e-256 or v5p-128 (cores, as Google Cloud counts them), "
  "v6e-64x2 for two slices, CHIP:SHAPE such as v5p:4x4x8; for GPUs h100x8, and h100x8x2 "
  "for two hosts; or here, for this machine's devices"
)
HERE = "here"
_POD_SIDE = 16  # chips per side of a v5e or v6e pod
_GPUS_PER_HOST = 8

# Chips in a slice -> shape of its torus, as Google Cloud sells them.
_SHAPES_2D = {
  1: (1, 1),
  4: (2, 2),
  8: (2, 4),
  16: (4, 4),
  32: (4, 8),
  64: (8, 8),
  128: (8, 16),
  256: (16, 16),
}
_SMALL_SHAPES_3D = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}


def platform(chip: chips.Chip | None) -> str:
  """Platform of a chip, or of this machine's devices, as JAX names it."""
  if chip is None:
    return jax.default_backend()
  return "gpu" if chip.gpu else "tpu"


class Topology(NamedTuple):
  """One TPU slice or several equal ones. For GPUs, one host or several.

  Attributes:
    name: The name as the user wrote it.
    chip: The chip, or None for this machine's devices.
    shape: Shape of a slice's torus in chips. For GPUs, (GPUs per host,).
    slices: Number of slices, or of hosts.
  """

  name: str
  chip: chips.Chip | None
  shape: tuple[int, ...]
  slices: int

  @property
  def num_devices(self) -> int:
    """Devices of all slices, as JAX counts them."""
    return self.num_chips * (self.chip.devices if self.chip else 1)

  @property
  def num_chips(self) -> int:
    """Chips of all slices."""
    return math.prod(self.shape) * self.slices

  @property
  def platform(self) -> str:
    """Platform of the devices, as JAX names it."""
    return platform(self.chip)

  @property
  def wraps(self) -> list[bool]:
    """For each of three dimensions, whether wrap-around links make it a ring.

    Google Cloud wires them this way: a three-dimensional slice is a torus if all of its sides are
    multiples of 4. In two dimensions a side is a ring if it spans a whole pod. libtpu has to be
    told. Where it sees no ring it implements an all-gather as an all-reduce over zeros.
    """
    if self.chip is not None and self.chip.torus == 3:
      return [all(side % 4 == 0 for side in self.shape)] * 3
    return [side == _POD_SIDE for side in self.shape] + [False]


def parse(name: str) -> Topology:
  """Parses the name of a topology. Loads no compiler, but 'here' starts JAX's backend.

  Raises:
    UserError: Not a topology name, unknown chip, or a slice size that is not sold.
  """
  if name == HERE:
    return Topology(name, None, (jax.device_count(),), 1)
  if match := _GPU_NAME.fullmatch(name):
    return _gpu_hosts(name, match)
  match = _TPU_NAME.fullmatch(name)
  if not match:
    raise UserError(f"--topology={name}: {_HELP}")
  chip = _find(name, match["chip"])
  if chip.gpu:
    raise UserError(f"--topology={name}: {chip.name} is a GPU; {_HELP}")
  if match["shape"]:
    shape = tuple(map(int, match["shape"].split("x")))
    if len(shape) != chip.torus:
      raise UserError(
        f"--topology={name}: the interconnect of {chip.name} has {chip.torus} "
        f"dimensions; write it as {chip.name}:{'x'.join(['4'] * chip.torus)}"
      )
    if 0 in shape:
      raise UserError(f"--topology={name}: each side needs at least one chip; {_HELP}")
    return Topology(name, chip, shape, 1)
  size, slices = int(match["size"]), int(match["slices"] or 1)
  if size % chip.cores or not size or not slices:
    raise UserError(
      f"--topology={name}: {chip.name} is counted in cores, {chip.cores} per chip; {_HELP}"
    )
  return Topology(name, chip, torus_shape(chip, size // chip.cores), slices)


def _find(name: str, chip: str) -> chips.Chip:
  try:
    return chips.CHIPS.find(chip)
  except UserError as e:
    raise UserError(f"--topology={name}: {e}") from e


def _gpu_hosts(name: str, match: re.Match[str]) -> Topology:
  chip, size, hosts = _find(name, match["chip"]), int(match["size"]), int(match["hosts"] or 1)
  if chip.gpu is None:
    raise UserError(f"--topology={name}: {chip.name} is not a GPU; {_HELP}")
  if not 1 <= size <= _GPUS_PER_HOST or not hosts:
    raise UserError(f"--topology={name}: a host has 1 to {_GPUS_PER_HOST} GPUs; {_HELP}")
  return Topology(name, chip, (size,), hosts)


def torus_shape(chip: chips.Chip, num_chips: int) -> tuple[int, ...]:
  """The usual torus of a slice: of the shapes with sides in multiples of 4, the most cubic one.

  Raises:
    UserError: Slices of this size are not sold.
  """
  if chip.torus == 2:
    if num_chips in _SHAPES_2D:
      return _SHAPES_2D[num_chips]
    raise UserError(
      f"{chip.name} comes in slices of {', '.join(map(str, _SHAPES_2D))} chips, not {num_chips}"
    )
  if num_chips in _SMALL_SHAPES_3D:
    return _SMALL_SHAPES_3D[num_chips]
  # Larger slices consist of cubes of 4 x 4 x 4 chips. Sides a <= b <= c, at most 32 for a and b.
  shapes = [
    (a, b, num_chips // (a * b))
    for a in range(4, 33, 4)
    for b in range(a, 33, 4)
    if num_chips % (a * b) == 0 and num_chips // (a * b) % 4 == 0 and num_chips // (a * b) >= b
  ]
  if not shapes:
    raise UserError(
      f"{chip.name} comes in slices of 4, 8, 16, 32 and multiples of 64 chips, not "
      f"{num_chips}; give the shape itself, such as {chip.name}:4x4x8"
    )
  return min(shapes, key=lambda s: (max(s) / min(s), s))


def devices(topology: Topology) -> list[jax.Device]:
  """Devices of a topology. Unless it is this machine's, they can compile programs but not run them.

  Raises:
    UserError: The compiler is not installed, or does not know the topology.
  """
  if topology.chip is None:
    return jax.devices()
  return list(_gpus(topology) if topology.chip.gpu else _tpus(topology))


def _gpus(topology: Topology) -> Any:
  assert topology.chip is not None and topology.chip.gpu is not None
  target = gpu_target_config.target_config(topology.chip.gpu)  # its errors name what is missing
  shape = f"1x{topology.slices}x{topology.shape[0]}"
  try:
    return topologies.get_topology_desc(
      topology.chip.name,
      "cuda",
      topology=shape,
      target_config=target,
    ).devices
  except Exception as e:  # from JAX's runtime, or from loading a library
    raise UserError(f"{gpu_target_config.NEEDS}; JAX says: {first_line(e)}") from e


def _tpus(topology: Topology) -> Any:
  assert topology.chip is not None
  shape = "x".join(map(str, topology.shape))
  options: dict[str, Any] = dict(topology.chip.libtpu_options) | {"wrap": topology.wraps}
  if topology.slices > 1:
    options["num_slices"] = topology.slices
  try:
    with dump.requested():  # this loads libtpu
      found = topologies.get_topology_desc(f"{topology.chip.libtpu}:{shape}", "tpu", **options)
  except Exception as e:  # from JAX's runtime, or from loading a library
    if "libtpu" in str(e) or isinstance(e, (ImportError, OSError)):
      raise UserError(
        "a plan for TPUs needs libtpu, their compiler: "
        "pip install 'jaxgpt[tpu]' (Linux; no TPU is needed)"
      ) from e
    raise UserError(
      f"--topology={topology.name}: libtpu does not know {topology.chip.libtpu}:{shape}: "
      f"{first_line(e)}"
    ) from e
  return found.devices


def mesh(c_mesh: ml_collections.ConfigDict, topology: Topology) -> jax.sharding.Mesh:
  """The mesh that a config's `mesh` section asks for, over the devices of a topology.

  Raises:
    UserError: See `devices` and `mesh.axis_sizes`.
  """
  return mesh_lib.make(c_mesh, devices(topology))
