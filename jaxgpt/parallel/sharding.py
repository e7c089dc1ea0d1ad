"""From logical axes to the mesh: one table, read for parameters and activations alike.

A parameter is declared once with its logical axes, in `model`. The tree of those axes decides how
it is sharded, whether it decays and whether Muon treats it as a matrix. The table is the config's
`mesh.rules`, and `mesh_rules.FIXED`, which no config may change.
"""

import dataclasses
import math

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import config, tree
from jaxgpt.config import mesh_rules
from jaxgpt.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rules:
  """The table, as a value that a model carries.

  Attributes:
    table: ((logical axis, mesh axes that cut it), …).
  """

  table: tuple

  def mesh_axes(self, axis):
    """The mesh axes that a dimension of a logical axis (or None) is cut over, as a tuple."""
    return dict(self.table)[axis] if axis else ()

  def num_shards(self, mesh, axis):
    """Parts that a dimension of a logical axis (or None) is cut into."""
    return math.prod(mesh.shape[name] for name in self.mesh_axes(axis))

  def spec(self, axes):
    """PartitionSpec of a tuple of logical axes (None: not sharded)."""
    return P(*(part(self.mesh_axes(axis)) for axis in axes))

  def fitting_spec(self, mesh, shape, axes):
    """As `spec`, but a dimension that the mesh does not divide stays whole."""
    return self.spec(
      axis if size % self.num_shards(mesh, axis) == 0 else None
      for axis, size in zip(axes, shape, strict=True)
    )

  def constrain(self, x, *axes):
    """Pins an activation to the mesh that `jax.set_mesh` has set; without a mesh, `x` as it is.

    Args:
      x: an array.
      *axes: a logical axis for each of its dimensions, or None. A dimension that the mesh does not
        divide, such as the one token of a decoding step, stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
      return x
    return jax.lax.with_sharding_constraint(x, self.fitting_spec(mesh, x.shape, axes))

  def check(self, name, axes):
    """Raises a UserError where a mesh axis would cut a parameter of these logical axes twice."""
    mesh_rules.check_sharded_once(dict(self.table), axes, f"parameter {name}")


def part(names):
  """Mesh axes, a tuple, as an entry of a PartitionSpec."""
  return names[0] if len(names) == 1 else names or None


def without(names, spec):
  """Those of some mesh axes that a PartitionSpec does not name."""
  named = {name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ())}
  return tuple(name for name in names if name not in named)


FIXED = Rules(tuple((axis, names) for axis, (names, _) in mesh_rules.FIXED.items()))


def rules(c_mesh):
  """The `Rules` of the config's `mesh` section."""
  own = ((axis, mesh_rules.mesh_axes_of(rule)) for axis, rule in c_mesh.rules.items())
  return Rules((*FIXED.table, *own))


DEFAULT = rules(config.base().mesh)


def is_axes(x):
  """Whether `x` is a leaf of an axes tree."""
  return isinstance(x, tuple)


def is_weight(axes):
  """Whether a parameter of these logical axes is a weight, and not a bias or a norm's scale."""
  inner = [a for a in axes if a != "layers"]
  return ("embed" in inner or "rank" in inner) and len(inner) > 1


def params_shardings(axes, shapes, mesh, rules):
  """NamedShardings for a tree of parameters.

  Args:
    axes: tree of tuples of logical axes.
    shapes: the same tree of `ShapeDtypeStruct`s.
    mesh: the device mesh.
    rules: a `Rules`.

  Raises:
    UserError: a mesh axis does not divide the dimension that it shards, which only `stage` may
      (stacks of a few layers, which are no part of a pipeline, are whole on each), or cuts two.
  """

  def one(name, names, shape):
    rules.check(name, names)
    for axis, size in zip(names, shape.shape, strict=True):
      shards = rules.num_shards(mesh, axis)
      if axis != "layers" and size % shards:
        cut = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in rules.mesh_axes(axis))
        raise UserError(f"{cut} does not divide dimension {axis!r} = {size} of parameter {name}")
    return NamedSharding(mesh, rules.fitting_spec(mesh, shape.shape, names))

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
  return NamedSharding(mesh, FIXED.spec(("rows",)))


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
  shards = FIXED.num_shards(mesh, "rows")
  held = {}
  for device, (part,) in rows.devices_indices_map((shards,)).items():
    held.setdefault(device.process_index, set()).add(part.indices(shards)[0])
  parts = sorted({tuple(sorted(numbers)) for numbers in held.values()})
  if len({len(p) for p in parts}) != 1 or sum(len(p) for p in parts) != shards:
    axes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in FIXED.mesh_axes("rows"))
    raise UserError(
      f"{axes} cut the batch so that the {len(held)} processes hold unequal parts of "
      "it; choose sizes whose product is a multiple or a divisor of their number"
    )
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
