"""Logical axes to mesh axes: how parameters, activations and batches are sharded.

A parameter is declared once with its logical axes, in `model`. The tree of those axes decides how
it is sharded, whether weight decay applies and whether Muon treats it as a matrix. The rules that
map logical axes to mesh axes are the config's `mesh.rules`, and `mesh_rules.FIXED`, which no config
may change. With the default rules and a mesh of fsdp 2 x tensor 2:

    parameter      layers/mlp/up    [layers, embed,  mlp    ]
    rules                            stage   fsdp    tensor
    PartitionSpec                   ('stage', 'fsdp', 'tensor')
    on a device    [layers, embed / 2, mlp / 2]
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import config, tree
from jaxgpt.config import mesh_rules
from jaxgpt.errors import UserError
from jaxgpt.tree import PyTree

# Logical axes that a mesh need not divide: stacks of a few layers that are not part of a pipeline,
# and ranks of latent attention, which divide fewer devices than the width does.
_OPTIONAL = ("layers", "latent")

AnyMesh: TypeAlias = jax.sharding.Mesh | jax.sharding.AbstractMesh
Axes: TypeAlias = Sequence[str | None]  # a logical axis for each dimension, or None


@dataclasses.dataclass(frozen=True)
class Rules:
  """Logical axis rules, as a value that a model carries.

  Attributes:
    table: ((logical axis, mesh axes that shard it), ...).
  """

  table: tuple[tuple[str, tuple[str, ...]], ...]

  def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
    """The mesh axes that shard a dimension of a logical axis, or () for None."""
    return dict(self.table)[axis] if axis else ()

  def num_shards(self, mesh: AnyMesh, axis: str | None) -> int:
    """Number of shards of a dimension of a logical axis, or 1 for None."""
    return math.prod(mesh.shape[name] for name in self.mesh_axes(axis))

  def spec(self, axes: Iterable[str | None]) -> P:
    """PartitionSpec of an array with these logical axes. None: not sharded."""
    return P(*(part(self.mesh_axes(axis)) for axis in axes))

  def fitting_spec(self, mesh: AnyMesh, shape: Sequence[int], axes: Axes) -> P:
    """As `spec`, except that dimensions which the mesh does not divide are not sharded."""
    return self.spec(
      axis if size % self.num_shards(mesh, axis) == 0 else None
      for axis, size in zip(axes, shape, strict=True)
    )

  def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an activation on the mesh that `jax.set_mesh` has set.

    Args:
      x: An array. Without a mesh it is returned as it is.
      *axes: The logical axis of each dimension, or None. Dimensions that the mesh does not divide,
        such as the one token of a decoding step, are not sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
      return x
    return jax.lax.with_sharding_constraint(x, self.fitting_spec(mesh, x.shape, axes))

  def check(self, name: str, axes: Axes) -> None:
    """Raises a UserError if a mesh axis would shard two dimensions of a parameter."""
    mesh_rules.check_sharded_once(dict(self.table), axes, f"parameter {name}")


def part(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
  """Mesh axes as an entry of a PartitionSpec."""
  return names[0] if len(names) == 1 else names or None


def used(spec: P) -> tuple[str, ...]:
  """The mesh axes that a PartitionSpec uses."""
  entries = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
  return tuple(name for entry in entries for name in entry)


def without(names: Iterable[str], spec: P) -> tuple[str, ...]:
  """Those of some mesh axes that a PartitionSpec does not use."""
  return tuple(name for name in names if name not in used(spec))


FIXED = Rules(tuple((axis, rule.mesh_axes) for axis, rule in mesh_rules.FIXED.items()))


def rules(c_mesh: Any) -> Rules:
  """The rules of the config's `mesh` section, including the fixed ones."""
  own = ((axis, mesh_rules.mesh_axes_of(rule)) for axis, rule in c_mesh.rules.items())
  return Rules((*FIXED.table, *own))


DEFAULT = rules(config.base().mesh)


def is_axes(x: Any) -> bool:
  """Whether `x` is a leaf of an axes tree."""
  return isinstance(x, tuple)


def is_weight(axes: Axes) -> bool:
  """Whether a parameter with these logical axes is a weight, as opposed to a bias or norm scale."""
  inner = [a for a in axes if a != "layers"]
  return bool({"embed", "latent", "rank"} & set(inner)) and len(inner) > 1


def params_shardings(axes: PyTree, shapes: PyTree, mesh: AnyMesh, rules: Rules) -> PyTree:
  """NamedShardings for a tree of parameters.

  Args:
    axes: Tree of tuples of logical axes.
    shapes: The same tree with `ShapeDtypeStruct`s.
    mesh: The device mesh, which may be abstract.
    rules: Logical axis rules.

  Raises:
    UserError: A mesh axis does not divide the dimension that it shards, or shards two dimensions.
      Dimensions of `_OPTIONAL` are replicated instead.
  """

  def one(name: str, names: Axes, shape: jax.ShapeDtypeStruct) -> NamedSharding:
    rules.check(name, names)
    for axis, size in zip(names, shape.shape, strict=True):
      shards = rules.num_shards(mesh, axis)
      if axis not in _OPTIONAL and size % shards:
        sizes = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in rules.mesh_axes(axis))
        raise UserError(f"{sizes} does not divide dimension {axis!r} = {size} of parameter {name}")
    return NamedSharding(mesh, rules.fitting_spec(mesh, shape.shape, names))

  return tree.map_named(one, axes, shapes, is_leaf=is_axes)


def like_params(
  state_shapes: PyTree, params_shapes: PyTree, shardings: PyTree, mesh: AnyMesh
) -> PyTree:
  """Shardings for a state that holds copies of the parameter tree, such as an optimizer's.

  A leaf whose path ends with a parameter's path, and which has that parameter's shape, gets its
  sharding. All other leaves, such as step counters and factored moments, are replicated.

  Args:
    state_shapes: Tree of `ShapeDtypeStruct`s.
    params_shapes: Tree of the parameters' `ShapeDtypeStruct`s.
    shardings: The parameters' NamedShardings.
    mesh: The device mesh.
  """
  shapes = {name: leaf.shape for name, leaf in tree.flatten(params_shapes).items()}
  named = tree.flatten(shardings)

  def one(path: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    keys = path.split("/")
    for i in range(len(keys)):
      name = "/".join(keys[i:])
      if shapes.get(name) == leaf.shape:
        return named[name]
    return NamedSharding(mesh, P())

  return tree.map_named(one, state_shapes)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
  """Sharding of a batch's arrays: rows over the data shards, all other dimensions whole."""
  return NamedSharding(mesh, FIXED.spec(("rows",)))


def host_slice(mesh: jax.sharding.Mesh, process: int | None = None) -> tuple[int, int]:
  """The slice of a batch's rows that the devices of a process hold.

  Which rows a process has to read follows from its devices' places in the mesh. With 4 rows, two
  processes A and B of two devices each, and their devices in mesh order:

      fsdp 4             fsdp 2 x tensor 2        tensor 4
      A  A  B  B         A A  rows 0-1            A A B B  all hold rows 0-3
      0  1  2  3         B B  rows 2-3
      (0, 2) (1, 2)      (0, 2) (1, 2)            (0, 1) (0, 1)   <- (index, count) of A and B

  Args:
    mesh: The device mesh.
    process: Number of the process. None: this one.

  Returns:
    (index, count): the rows are slice `index` of `count` equal slices. Processes that hold copies
    of the same rows get the same index.

  Raises:
    UserError: The processes hold slices that are unequal or overlap.
  """
  process = jax.process_index() if process is None else process
  rows = batch_sharding(mesh)
  shards = FIXED.num_shards(mesh, "rows")
  held: dict[int, set[int]] = {}  # process -> shards of the rows on its devices
  shards_of_devices: Mapping[Any, Any] = rows.devices_indices_map((shards,))
  for device, (index,) in shards_of_devices.items():
    held.setdefault(device.process_index, set()).add(index.indices(shards)[0])
  slices = sorted({tuple(sorted(numbers)) for numbers in held.values()})
  if len({len(s) for s in slices}) != 1 or sum(len(s) for s in slices) != shards:
    axes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in FIXED.mesh_axes("rows"))
    raise UserError(
      f"{axes}: the {len(held)} processes would hold unequal parts of the batch; choose sizes "
      "whose product is a multiple or a divisor of the number of processes"
    )
  return slices.index(tuple(sorted(held[process]))), len(slices)


def global_array(rows: NamedSharding, local: np.ndarray, count: int) -> jax.Array:
  """A global array from the slices of its rows that each process holds.

  Args:
    rows: Sharding of the global array, over its first dimension.
    local: This process's slice.
    count: Number of slices in the global array.
  """
  shape = (local.shape[0] * count, *local.shape[1:])
  with jax.transfer_guard_host_to_device("allow"):  # JAX considers this an implicit transfer
    return jax.make_array_from_process_local_data(rows, local, shape)


def device_bytes(tree: PyTree) -> int:
  """Bytes of a tree of sharded `ShapeDtypeStruct`s on one device, without padding."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
  )
