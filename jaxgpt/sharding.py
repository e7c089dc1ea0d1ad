"""From logical axes to the mesh: one table, read for parameters and activations alike.

A parameter is declared once with its logical axes, in `model`. The tree of those axes decides how
it is sharded, whether it decays and whether Muon treats it as a matrix.
"""

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
    "batch": ("data", "fsdp"),
    "length": "seq",
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
    *axes: a logical axis for each of its dimensions, or None.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes))


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
    UserError: a mesh axis does not divide the dimension that it shards.
  """
  def one(name, names, shape):
    for axis, size in zip(names, shape.shape, strict=True):
      mesh_axis = RULES[axis]
      if mesh_axis and size % mesh.shape[mesh_axis]:
        raise UserError(f"mesh.{mesh_axis}={mesh.shape[mesh_axis]} does not divide dimension "
                        f"{axis!r} = {size} of parameter {name}")
    return NamedSharding(mesh, spec(names))

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
  return NamedSharding(mesh, spec(("batch",)))
