"""The devices as a mesh with named axes."""

import importlib.util
import math
import os

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxgpt.config import MESH_AXES, mesh_rules
from jaxgpt.errors import UserError
from jaxgpt.parallel import chips
from jaxgpt.storage import malloc

_ACCELERATOR_PLUGINS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
_ROWS = mesh_rules.FIXED["rows"].mesh_axes  # axes that share a batch's rows


def axis_sizes(c_mesh, num_devices):
  """Sizes of the mesh axes with -1 filled in.

  Args:
    c_mesh: the config's `mesh` section; at most one axis is -1.
    num_devices: how many devices the mesh covers.

  Returns:
    {axis: size} in the order of `MESH_AXES`.

  Raises:
    UserError: the sizes don't multiply to the number of devices.
  """
  sizes = {axis: c_mesh[axis] for axis in MESH_AXES}
  text = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size != 1) or "all 1"
  if any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f"{text}: each axis must be at least 1, or -1 for what is left")
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise UserError(f"{text}: only one axis may be -1")
  given = math.prod(size for size in sizes.values() if size != -1)
  if free:
    if num_devices % given:
      raise UserError(f"{text}: {given} does not divide the {num_devices} devices there are")
    sizes[free[0]] = num_devices // given
  elif given != num_devices:
    raise UserError(
      f"{text}: the axes multiply to {given}, but there are {num_devices} devices; "
      "set one axis to -1 to take what is left"
    )
  return sizes


def make(c_mesh, devices=None):
  """A mesh over `devices` (default: all there are) with all of `MESH_AXES`.

  Raises:
    UserError: see `axis_sizes` and `over_slices`.
  """
  there = jax.devices() if devices is None else devices
  sizes = axis_sizes(c_mesh, len(there))
  types = (AxisType.Auto,) * len(MESH_AXES)
  if len({getattr(d, "slice_index", 0) for d in there}) > 1:
    return Mesh(over_slices(sizes, there), MESH_AXES, axis_types=types)
  # A mesh axis is whole axes of the torus where there are such, and parts of them where not.
  grid = mesh_utils.create_device_mesh(tuple(sizes.values()), there, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=types)


def num_batch_shards(sizes):
  """Parts that the rows of a batch are cut into, of {axis: size}."""
  return math.prod(sizes[axis] for axis in _ROWS)


def over_slices(sizes, devices):
  """The devices of several TPU slices as a grid whose first axis that can goes over the slices.

  Between slices is the data center's network, far slower than the links within: `data` crosses it
  with gradients alone, `stage`, where `data` is no multiple of the slices, with what one stage hands
  to the next, and `fsdp`, where neither is, with gathered weights.

  Args:
    sizes: {axis: size} from `axis_sizes`.
    devices: each with its `slice_index`.

  Raises:
    UserError: none of them is a multiple of the slices.
  """
  slices = len({d.slice_index for d in devices})
  across = next((axis for axis in ("data", "stage", "fsdp") if sizes[axis] % slices == 0), None)
  if across is None:
    raise UserError(
      f"mesh.data={sizes['data']}, mesh.stage={sizes['stage']}, mesh.fsdp="
      f"{sizes['fsdp']}: the {slices} slices need a multiple of {slices} in one of "
      "them, best in mesh.data"
    )
  within = {axis: size // slices if axis == across else size for axis, size in sizes.items()}
  between = {axis: slices if axis == across else 1 for axis in sizes}
  return mesh_utils.create_hybrid_device_mesh(
    tuple(within.values()), tuple(between.values()), devices, allow_split_physical_axes=True
  )


def check_batch(sizes, batch_size, accumulate=1, key="data.batch_size"):
  """Raises a UserError where the data shards don't divide the rows of a microbatch.

  Args:
    sizes: {axis: size} from `axis_sizes`.
    batch_size: rows of the global batch.
    accumulate: microbatches the batch is cut into.
    key: config key to name in the message.
  """
  shards = num_batch_shards(sizes)
  if batch_size % (shards * accumulate):
    parts = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in _ROWS if sizes[axis] > 1)
    if accumulate > 1:
      parts += f" x optim.accumulate={accumulate}"
    raise UserError(
      f"{key}={batch_size} is no multiple of {parts} = {shards * accumulate}; "
      f"choose a multiple, or a smaller mesh"
    )


def check_length(sizes, seq_len, form):
  """Raises a UserError where the rows cannot be cut over the mesh, each device with two chunks.

  Args:
    sizes: {axis: size} from `axis_sizes`.
    seq_len: tokens a row.
    form: of attention.
  """
  n = sizes["seq"]
  unit = 2 * n * (chips.LANES if form == "splash" else 1)  # the kernel's smallest block
  if n > 1 and seq_len % unit:
    near = max(round(seq_len / unit), 1) * unit
    raise UserError(
      f"data.seq_len={seq_len} is no multiple of {unit}, which mesh.seq={n} needs with "
      f"model.attention={form!r}: each device has two chunks of a row; set "
      f"data.seq_len={near}, or mesh.seq=1"
    )


def check_memory(mesh, kind, key):
  """Raises a UserError where a device has no memory of a kind.

  Args:
    mesh: the device mesh.
    kind: such as 'pinned_host', the host's that devices reach by themselves.
    key: config key and value to name in the message.
  """
  device = mesh.devices.flat[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  if kind not in kinds:
    raise UserError(
      f"{key} needs memory of the kind {kind}, and {device.device_kind} has "
      f"{', '.join(kinds) or 'none that it names'}; choose what is saved or computed "
      "again, such as model.remat=save:q,k,v,attention"
    )


def prepare_cpu(several=False):
  """Prepares the process for XLA's CPU backend, where that is what runs; before JAX is started.

  Keeps glibc from giving memory back: XLA allocates its temporaries anew each step, and mapping
  their pages again costs a third of a small model's step (docs/log.md). The process stays as large
  as it ever was. With several pretended devices or several processes, runs one program at a time:
  two in flight share one pool of threads, and their collectives can wait for each other for ever.

  Args:
    several: whether this process is one of several.
  """
  accelerated = any(importlib.util.find_spec(name) for name in _ACCELERATOR_PLUGINS)
  if os.environ.get("JAX_PLATFORMS", "" if accelerated else "cpu") != "cpu":
    return
  if several or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_cpu_enable_async_dispatch", False)
  malloc.keep()
