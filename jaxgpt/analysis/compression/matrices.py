"""The weights of a model as matrices, read from the tree of logical axes."""

import fnmatch
from collections.abc import Sequence

from jaxgpt import tree
from jaxgpt.errors import UserError, nearest
from jaxgpt.parallel import sharding
from jaxgpt.run.compression.matrix import Matrix
from jaxgpt.training import optimizers
from jaxgpt.tree import PyTree


def of(axes: PyTree, shapes: PyTree) -> dict[str, Matrix]:
  """The layers' matrices of a model by path. Routers, norms, biases and embeddings are none.

  Args:
    axes: Tree of logical axes, see `transformer.abstract`.
    shapes: Tree of arrays or `ShapeDtypeStruct`s.
  """
  of_path = tree.flatten(shapes)
  return {
    path: Matrix(path, tuple(of_path[path].shape), *dims)
    for path, names in tree.flatten(axes, is_leaf=sharding.is_axes).items()
    if (dims := optimizers.matrix_axes(names)) is not None
  }


def chosen(axes: PyTree, shapes: PyTree, patterns: Sequence[str]) -> list[str]:
  """The parameters that a user chose, in tree order.

  Args:
    axes: As for `of`.
    shapes: As for `of`.
    patterns: Patterns of paths, such as 'layers/mlp/*'. (): all matrices of the layers.

  Raises:
    UserError: A pattern matches no parameter.
  """
  if not patterns:
    return list(of(axes, shapes))
  paths = list(tree.flatten(shapes))
  for pattern in patterns:
    if not fnmatch.filter(paths, pattern):
      raise UserError(
        f"--match={pattern}: matches no parameter; {nearest(pattern, paths)}there are: "
        f"{', '.join(sorted(paths))}"
      )
  return [path for path in paths if any(fnmatch.fnmatchcase(path, p) for p in patterns)]


def outside(axes: PyTree, shapes: PyTree) -> dict[str, Matrix]:
  """The matrices outside of the layers by path: embeddings, with D inputs, and heads.

  Args:
    axes: As for `of`.
    shapes: As for `of`.
  """
  of_path = tree.flatten(shapes)
  found = {}
  for path, names in tree.flatten(axes, is_leaf=sharding.is_axes).items():
    if "layers" not in names and sharding.is_weight(names):
      hub = names.index("embed")
      outs = tuple(i for i in range(len(names)) if i != hub)
      found[path] = Matrix(path, tuple(of_path[path].shape), (hub,), outs)
  return found
