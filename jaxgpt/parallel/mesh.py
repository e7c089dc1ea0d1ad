"""The device mesh: all devices in a grid with one named axis per kind of parallelism.

The config gives the size of each axis, with -1 for the devices that are left:

    mesh axis   shards
    data        the rows of a batch. Parameters are replicated
    fsdp        the rows of a batch, and the parameters
    seq         the tokens of each row
    tensor      heads, MLP columns, the vocabulary
    expert      the experts, and the rows of a batch
    stage       the layers. Outside of them the rows of a batch

On a TPU slice a mesh axis is a whole dimension of the torus if the sizes allow it, so that its
collectives use all links of a ring. With several slices, one axis crosses the slow network between
them (`over_slices`).
"""

import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib import metadata

import jax
import ml_collections
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxgpt.config import MESH_AXES, mesh_rules
from jaxgpt.errors import UserError
from jaxgpt.parallel import chips
from jaxgpt.storage import malloc

_ACCELERATOR_PLUGINS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
_PROGRAMS_IN_FLIGHT = 32  # of each device, in PJRT's CPU client
_YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_ROW_AXES = mesh_rules.FIXED["rows"].mesh_axes  # mesh axes that shard a batch's rows


def axis_sizes(c_mesh: ml_collections.ConfigDict, num_devices: int) -> dict[str, int]:
  """Sizes of the mesh axes, with -1 filled in.

  Args:
    c_mesh: The config's `mesh` section. At most one axis is -1.
    num_devices: Number of devices in the mesh.

  Returns:
    {axis: size} in the order of `MESH_AXES`.

  Raises:
    UserError: The sizes do not multiply to the number of devices.
  """
  sizes = {axis: c_mesh[axis] for axis in MESH_AXES}
  text = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size != 1) or "all 1"
  if any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f"{text}: each axis must be at least 1, or -1 for the devices that are left")
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise UserError(f"{text}: only one axis may be -1")
  given = math.prod(size for size in sizes.values() if size != -1)
  if free:
    if num_devices % given:
      raise UserError(
        f"{text}: {given} does not divide the {num_devices} devices; choose a divisor"
      )
    sizes[free[0]] = num_devices // given
  elif given != num_devices:
    raise UserError(
      f"{text}: the axes multiply to {given}, but there are {num_devices} devices; "
      "set one axis to -1 to use the devices that are left"
    )
  return sizes


def make(c_mesh: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with all of `MESH_AXES`.

  Args:
    c_mesh: The config's `mesh` section.
    devices: The devices. None: all devices of all processes.

  Raises:
    UserError: See `axis_sizes` and `over_slices`.
  """
  used = jax.devices() if devices is None else devices
  sizes = axis_sizes(c_mesh, len(used))
  types = (AxisType.Auto,) * len(MESH_AXES)
  if len({getattr(d, "slice_index", 0) for d in used}) > 1:
    return Mesh(over_slices(sizes, used), MESH_AXES, axis_types=types)
  # A mesh axis covers whole dimensions of the torus if the sizes allow it, otherwise parts of them.
  grid = mesh_utils.create_device_mesh(tuple(sizes.values()), used, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=types)


def num_batch_shards(sizes: Mapping[str, int]) -> int:
  """Number of shards of a batch's rows, on a mesh of {axis: size}."""
  return math.prod(sizes[axis] for axis in _ROW_AXES)


def axis_over_slices(sizes: Mapping[str, int], slices: int) -> str:
  """The mesh axis that crosses the network between TPU slices.

  The network between slices is far slower than the links within one, so the axis that sends the
  least goes over it. That is `data`, which sends only gradients. If `data` is not a multiple of the
  number of slices it is `stage`, which sends the activations between two stages, and otherwise
  `fsdp`, which sends gathered weights.

  Args:
    sizes: {axis: size} from `axis_sizes`.
    slices: Number of slices.

  Raises:
    UserError: None of these axes is a multiple of the number of slices.
  """
  across = next((axis for axis in ("data", "stage", "fsdp") if sizes[axis] % slices == 0), None)
  if across is None:
    raise UserError(
      f"mesh.data={sizes['data']}, mesh.stage={sizes['stage']}, mesh.fsdp="
      f"{sizes['fsdp']}: the {slices} slices need a multiple of {slices} in one of "
      "them, best in mesh.data"
    )
  return across


def over_slices(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
  """The devices of several TPU slices as a grid, with `axis_over_slices` over the slices.

  Args:
    sizes: {axis: size} from `axis_sizes`.
    devices: Devices with a `slice_index`.

  Raises:
    UserError: See `axis_over_slices`.
  """
  slices = len({d.slice_index for d in devices})
  across = axis_over_slices(sizes, slices)
  within = {axis: size // slices if axis == across else size for axis, size in sizes.items()}
  between = {axis: slices if axis == across else 1 for axis in sizes}
  return mesh_utils.create_hybrid_device_mesh(
    tuple(within.values()), tuple(between.values()), devices, allow_split_physical_axes=True
  )


def check_batch(
  sizes: Mapping[str, int], batch_size: int, accumulate: int = 1, key: str = "data.batch_size"
) -> None:
  """Checks that the data shards divide the rows of a microbatch.

  Args:
    sizes: {axis: size} from `axis_sizes`.
    batch_size: Rows of the global batch.
    accumulate: Microbatches per step.
    key: Config key of the batch size, for the message.

  Raises:
    UserError: They do not.
  """
  shards = num_batch_shards(sizes)
  if batch_size % (shards * accumulate):
    given = [f"mesh.{axis}={sizes[axis]}" for axis in _ROW_AXES if sizes[axis] > 1]
    if accumulate > 1:
      given.append(f"optim.accumulate={accumulate}")
    factors = " x ".join(given) + (f" = {shards * accumulate}" if len(given) > 1 else "")
    raise UserError(
      f"{key}={batch_size} is not a multiple of {factors}; choose a multiple, or a smaller mesh"
    )


def check_length(sizes: Mapping[str, int], seq_len: int, form: str) -> None:
  """Checks that rows can be sharded over `mesh.seq`, with two chunks of a row on each device.

  Args:
    sizes: {axis: size} from `axis_sizes`.
    seq_len: Tokens per row.
    form: Implementation of attention.

  Raises:
    UserError: The chunks would have unequal lengths, or splash attention could not use them.
  """
  n = sizes["seq"]
  unit = 2 * n * (chips.LANES if form == "splash" else 1)  # the smallest block of the kernel
  if n > 1 and seq_len % unit:
    near = max(round(seq_len / unit), 1) * unit
    raise UserError(
      f"data.seq_len={seq_len} is not a multiple of {unit}, which mesh.seq={n} needs with "
      f"model.attention={form!r}: each device holds two chunks of a row; set "
      f"data.seq_len={near}, or mesh.seq=1"
    )


def check_memory(mesh: Mesh, kind: str, key: str) -> None:
  """Checks that the devices have a kind of memory.

  Args:
    mesh: The device mesh.
    kind: Kind of memory as JAX names it, such as 'pinned_host', host memory that devices can read.
    key: Config key and value that need it, for the message.

  Raises:
    UserError: They have not.
  """
  device = mesh.devices.flat[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  if kind not in kinds:
    raise UserError(
      f"{key} needs memory of the kind {kind}, and {device.device_kind} has "
      f"{', '.join(kinds) or 'none that it names'}; save or recompute these activations instead, "
      "such as model.remat=save:q,k,v,attention"
    )


def correct_xla_flags(flags: str, jaxlib_version: str) -> str:
  """XLA's flags, with the library off that some versions of jaxlib sum with on CPU.

  With it, jaxlib 0.10.2 and 0.11 end the process at sums over arrays of seven dimensions, and give
  wrong sums of some products with more than 32,768 rows (jax-ml/jax issues 40412 and 39103). A
  setting of the user's own is kept.

  Args:
    flags: The value of `XLA_FLAGS`.
    jaxlib_version: As in its metadata: "0.10.2".
  """
  version = tuple(int(n) for n in re.findall(r"\d+", jaxlib_version)[:3])
  if not (0, 10, 2) <= version < (0, 12) or _YNN_FLAG in flags:
    return flags
  return f"{flags} {_YNN_FLAG}=-reduce".strip()


def avoid_wrong_sums() -> None:
  """Sets `XLA_FLAGS` by `correct_xla_flags`. Call it before JAX starts; later it has no effect."""
  flags = correct_xla_flags(os.environ.get("XLA_FLAGS", ""), metadata.version("jaxlib"))
  if flags:
    os.environ["XLA_FLAGS"] = flags


def prepare_cpu(several: bool = False) -> None:
  """Configures XLA's CPU backend, if that is the backend. Call it before JAX starts.

  Sums are kept from a library that is wrong in some versions (`avoid_wrong_sums`).

  glibc is told to keep freed memory: XLA allocates its temporaries again in each step, and mapping
  their pages again costs a third of a small model's step (docs/log.md). The process then never
  shrinks. With several fake devices or several processes, programs in flight share a thread pool,
  and their collectives can block each other forever. Asynchronous dispatch is turned off, and the
  pool gets a thread for each program in flight (`threads_for_collectives`).

  Args:
    several: Whether this process is one of several.
  """
  accelerated = any(importlib.util.find_spec(name) for name in _ACCELERATOR_PLUGINS)
  if os.environ.get("JAX_PLATFORMS", "" if accelerated else "cpu") != "cpu":
    return
  avoid_wrong_sums()
  devices = _fake_devices()
  if several or devices > 1:
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if threads := threads_for_collectives(devices, metadata.version("jaxlib")):
      os.environ.setdefault("PJRT_NPROC", str(threads))
  malloc.keep()


def threads_for_collectives(devices: int, jaxlib: str) -> int | None:
  """Threads that XLA's CPU client needs so that collectives in flight can't block each other.

  Before 0.12 (seen in 0.10.2), jaxlib returns from a program of several devices before it has
  run, even without asynchronous dispatch. The participants of a collective hold threads while they
  wait for the others, and by default there are as many threads as devices: two programs in flight
  can wait forever. PJRT lets each device have 32 programs in flight.

  Args:
    devices: Devices of this process.
    jaxlib: Its version, such as "0.10.2".

  Returns:
    The value of the environment variable PJRT_NPROC, or None for versions that don't need it.
  """
  version = tuple(int(n) for n in re.findall(r"\d+", jaxlib)[:2])
  return devices * (_PROGRAMS_IN_FLIGHT + 1) if version < (0, 12) else None


def _fake_devices() -> int:
  """The number of CPU devices that XLA_FLAGS or JAX's own option ask for."""
  flag = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
  if flag:
    return int(flag[1])
  return max(1, jax.config.jax_num_cpu_devices)  # type: ignore[attr-defined]  # set dynamically
