"""From a name such as `v5e-256` to devices that only compile, and a mesh of them."""

import math
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.plan import chips, gpu_targets

_NAME = re.compile(
  r"(?P<chip>v\d+[a-z]*|tpu7x)(-(?P<size>\d+)|:(?P<shape>\d+(x\d+)+))"
  r"(?:x(?P<slices>\d+))?"
)
_POD_SIDE = 16  # chips, of v5e and v6e
_GPUS = re.compile(r"(?P<chip>[a-z]+\d+)x(?P<size>\d+)(?:x(?P<hosts>\d+))?")
_HELP = (
  "write CHIP-SIZE such as v5e-256 or v5p-128 (cores, as Google Cloud counts them), "
  "v6e-64x2 for two slices, CHIP:SHAPE such as v5p:4x4x8; for GPUs h100x8, and h100x8x2 "
  "for two hosts; or here, for this machine's devices"
)
HERE = "here"
_GPUS_OF_A_HOST = 8


class Topology(NamedTuple):
  """A slice, or several equal ones; of GPUs, a host or several.

  Attributes:
    name: as the user wrote it.
    chip: a `chips.Chip`; None of this machine's devices.
    shape: of the torus of a slice; of GPUs, how many a host has.
    slices: how many.
  """

  name: str
  chip: chips.Chip
  shape: tuple
  slices: int

  @property
  def num_devices(self):
    """Devices of all slices, as JAX counts them."""
    return self.num_chips * (self.chip.devices if self.chip else 1)

  @property
  def num_chips(self):
    return math.prod(self.shape) * self.slices

  @property
  def wraps(self):
    """For each of three dimensions whether its ends are linked, as Google Cloud sells slices.

    Three-dimensional slices are tori where all of their sides are multiples of 4, in two
    dimensions a side is a ring where it is a whole pod's. libtpu knows neither by itself, and
    gathers by an all-reduce over zeros where it sees no ring.
    """
    if self.chip.torus == 3:
      return [all(side % 4 == 0 for side in self.shape)] * 3
    return [side == _POD_SIDE for side in self.shape] + [False]


def parse(name):
  """The topology of a name; nothing is loaded, but for 'here' JAX's backend.

  Raises:
    UserError: not a name, no such chip, or no slice of this size.
  """
  if name == HERE:
    return Topology(name, None, (jax.device_count(),), 1)
  found = _GPUS.fullmatch(name)
  if found:
    return _hosts(name, found)
  found = _NAME.fullmatch(name)
  if not found:
    raise UserError(f"--topology={name}: {_HELP}")
  chip = chips.find(found["chip"])
  if found["shape"]:
    shape = tuple(map(int, found["shape"].split("x")))
    if len(shape) != chip.torus:
      raise UserError(
        f"--topology={name}: the interconnect of {chip.name} has {chip.torus} "
        f"dimensions; write it as {chip.name}:{'x'.join(['4'] * chip.torus)}"
      )
    if 0 in shape:
      raise UserError(f"--topology={name}: a side of no chips; {_HELP}")
    return Topology(name, chip, shape, 1)
  size, slices = int(found["size"]), int(found["slices"] or 1)
  if size % chip.cores or not size or not slices:
    raise UserError(
      f"--topology={name}: {chip.name} is counted in cores, {chip.cores} a chip; {_HELP}"
    )
  return Topology(name, chip, chips.torus_shape(chip, size // chip.cores), slices)


def _hosts(name, found):
  chip, size, hosts = chips.find(found["chip"]), int(found["size"]), int(found["hosts"] or 1)
  if chip.gpu is None:
    raise UserError(f"--topology={name}: {chip.name} is no GPU; {_HELP}")
  if not 1 <= size <= _GPUS_OF_A_HOST or not hosts:
    raise UserError(f"--topology={name}: a host has 1 to {_GPUS_OF_A_HOST} GPUs; {_HELP}")
  return Topology(name, chip, (size,), hosts)


def devices(topology):
  """Devices of a topology that programs can be compiled for.

  Raises:
    UserError: the compiler is not installed, or does not know the topology.
  """
  if topology.chip is None:
    return jax.devices()
  return _gpus(topology) if topology.chip.gpu else _tpus(topology)


def _gpus(topology):
  shape = f"1x{topology.slices}x{topology.shape[0]}"
  try:
    return topologies.get_topology_desc(
      topology.chip.name,
      "cuda",
      topology=shape,
      target_config=gpu_targets.target_config(topology.chip.gpu),
    ).devices
  except Exception as e:  # of JAX's runtime, or whatever loading a library raises
    raise UserError(
      "a plan for GPUs needs JAX's CUDA plugin and NVIDIA's libraries: "
      "pip install 'jaxgpt[cuda]' (Linux; neither a GPU nor a driver is needed); JAX "
      f"says: {(str(e).splitlines() or ['?'])[0]}"
    ) from e


def _tpus(topology):
  shape = "x".join(map(str, topology.shape))
  options = dict(topology.chip.options) | {"wrap": topology.wraps}
  if topology.slices > 1:
    options["num_slices"] = topology.slices
  try:
    found = topologies.get_topology_desc(f"{topology.chip.libtpu}:{shape}", "tpu", **options)
  except Exception as e:  # of JAX's runtime, or whatever loading a library raises
    if "libtpu" in str(e) or isinstance(e, (ImportError, OSError)):
      raise UserError(
        "a plan for TPUs needs libtpu, their compiler: "
        "pip install 'jaxgpt[tpu]' (Linux; no TPU is needed)"
      ) from e
    raise UserError(
      f"--topology={topology.name}: libtpu knows no {topology.chip.libtpu}:{shape}: "
      f"{str(e).splitlines()[0]}"
    ) from e
  return found.devices


def mesh(c_mesh, topology):
  """The mesh that a config asks for, over the devices of a topology.

  Raises:
    UserError: see `devices` and `mesh.axis_sizes`.
  """
  return mesh_lib.make(c_mesh, devices(topology))
