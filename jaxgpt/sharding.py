"""From logical axes to the mesh: one table, read for parameters and activations alike.

A parameter is declared once with its logical axes, in `model`. The tree of those axes decides how
it is sharded, whether it decays and whether Muon treats it as a matrix.
"""

import math

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import tree
from jaxgpt.errors import UserError

RULES = {
    # Parameters.
    "vocab": "tensor",
    "positions": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "norm": None,
    "experts": "expert",
    "router": None,
    "rank": None,
    "labels": None,
    "layers": "stage",
    # Activations and batches.
    "rows": ("data", "fsdp", "expert", "stage"),  # of the batch, where all stages do the same
    "batch": ("data", "fsdp", "expert"),  # rows within the layers, where a stage has its own
    "stages": "stage",
    "length": "seq",
    "residual_length": ("seq", "tensor"),  # between the blocks, where no head and no column is
    "expert_batch": ("data", "fsdp"),  # rows that were sent to the experts
    "act_embed": None,
    "act_mlp": "tensor",
    "act_heads": "tensor",
    "act_vocab": "tensor",
}


def spec(axes):
  """PartitionSpec of a tuple of logical axes (None: not sharded)."""
  return P(*(RULES[axis] if axis else None for axis in axes))


def constrain(x, *axes):
  """Pins an activation to the mesh that `jax.set_mesh` has set; without a mesh, `x` as it is.

  Args:
    x: an array.
    *axes: a logical axis for each of its dimensions, or None. A dimension that the mesh does not
      divide, such as the one token of a decoding step, stays whole.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, fitting_spec(mesh, x.shape, axes))


def fitting_spec(mesh, shape, axes):
  """As `spec`, but a dimension that the mesh does not divide stays whole."""
  return spec(axis if size % num_shards(mesh, axis) == 0 else None
              for axis, size in zip(axes, shape, strict=True))


def mesh_axes(axis):
  """The mesh axes that a dimension of a logical axis (or None) is cut over, as a tuple."""
  names = RULES[axis] if axis else None
  return (names,) if isinstance(names, str) else names or ()


def num_shards(mesh, axis):
  """Parts that a dimension of a logical axis (or None) is cut into."""
  return math.prod(mesh.shape[name] for name in mesh_axes(axis))


def is_axes(x):
  """Whether `x` is a leaf of an axes tree."""
  return isinstance(x, tuple)


def is_weight(axes):
  """Whether a parameter of these logical axes is a weight, and not a bias or a norm's scale."""
  inner = [a for a in axes if a != "layers"]
  return ("embed" in inner or "rank" in inner) and len(inner) > 1


def params_shardings(axes, shapes, mesh):
  """NamedShardings for a tree of parameters.

  Args:
    axes: tree of tuples of logical axes.
    shapes: the same tree of `ShapeDtypeStruct`s.
    mesh: the device mesh.

  Raises:
    UserError: a mesh axis does not divide the dimension that it shards. Only `stage` may: stacks
      of a few layers, which are no part of a pipeline, are whole on each.
  """
  def one(name, names, shape):
    for axis, size in zip(names, shape.shape, strict=True):
      if axis != "layers" and size % num_shards(mesh, axis):
        raise UserError(f"mesh.{RULES[axis]}={num_shards(mesh, axis)} does not divide dimension "
                        f"{axis!r} = {size} of parameter {name}")
    return NamedSharding(mesh, fitting_spec(mesh, shape.shape, names))

  return tree.map_named(one, axes, shapes, is_leaf=is_axes)


def like_params(state_shapes, params_shapes, shardings, mesh):
  """Shardings for a state that holds copies of the parameter tree, such as an optimizer's.

  A leaf whose path ends in a parameter's path and that has its shape is sharded like that
  parameter; any other (counters, factored moments) is replicated.

  Args:
    state_shapes: tree of `ShapeDtypeStruct`s.
    params_shapes, shardings: the parameters' shapes and NamedShardings.
    mesh: the device mesh.
  """
  shapes = {name: leaf.shape for name, leaf in tree.flatten(params_shapes).items()}
  named = tree.flatten(shardings)

  def one(path, leaf):
    parts = path.split("/")
    for i in range(len(parts)):
      name = "/".join(parts[i:])
      if shapes.get(name) == leaf.shape:
        return named[name]
    return NamedSharding(mesh, P())

  return tree.map_named(one, state_shapes)


def batch_sharding(mesh):
  """NamedSharding of a batch's arrays: rows over the data shards, whatever follows kept whole."""
  return NamedSharding(mesh, spec(("rows",)))


def host_slice(mesh, process=None):
  """Which part of a batch's rows the devices of a process hold.

  Args:
    mesh: the device mesh.
    process: its number; default: this one.

  Returns:
    (index, count): part `index` of `count` equal parts. Processes that hold copies of the same
    rows, as with a mesh axis over hosts that does not share the batch, get the same index.

  Raises:
    UserError: the processes hold unequal or overlapping parts.
  """
  process = jax.process_index() if process is None else process
  rows = batch_sharding(mesh)
  shards = math.prod(mesh.shape[axis] for axis in RULES["rows"])
  held = {}
  for device, (part,) in rows.devices_indices_map((shards,)).items():
    held.setdefault(device.process_index, set()).add(part.indices(shards)[0])
  parts = sorted({tuple(sorted(numbers)) for numbers in held.values()})
  if len({len(p) for p in parts}) != 1 or sum(len(p) for p in parts) != shards:
    axes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in RULES["rows"])
    raise UserError(f"{axes} cut the batch so that the {len(held)} processes hold unequal parts of "
                    "it; choose sizes whose product is a multiple or a divisor of their number")
  return parts.index(tuple(sorted(held[process]))), len(parts)



def global_array(rows, part, count):
  """This process's part of an array that is cut over all processes, put on its devices.

  Args:
    rows: NamedSharding of the whole, over its first dimension.
    part: what this process holds, an array.
    count: how many parts make the whole.
  """
  shape = (part.shape[0] * count, *part.shape[1:])
  with jax.transfer_guard_host_to_device("allow"):  # JAX takes it for an implicit transfer
    return jax.make_array_from_process_local_data(rows, part, shape)
