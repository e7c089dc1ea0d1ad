"""Pytrees whose leaves are known by their path, such as 'layers/attn/q'."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import jax

PyTree: TypeAlias = Any  # any nesting of dicts, tuples and NamedTuples around arrays
IsLeaf: TypeAlias = Callable[[Any], bool]


def path_name(path: tuple[Any, ...]) -> str:
  """'layers/attn/q' from a key path of `jax.tree_util`."""
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(tree: PyTree, is_leaf: IsLeaf | None = None) -> dict[str, Any]:
  """{path: leaf}, in tree order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return {path_name(path): leaf for path, leaf in leaves}


def unflatten(named: Mapping[str, Any]) -> dict[str, Any]:
  """The nested dict with these leaves: the inverse of `flatten`.

  Args:
    named: {path: leaf}.
  """
  out: dict[str, Any] = {}
  for path, leaf in named.items():
    *parents, name = path.split("/")
    node = out
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return out


def map_named(
  f: Callable[..., Any], tree: PyTree, *rest: PyTree, is_leaf: IsLeaf | None = None
) -> PyTree:
  """Like `jax.tree.map`, with the leaf's path as the first argument of `f`."""
  named = lambda path, *leaves: f(path_name(path), *leaves)
  return jax.tree_util.tree_map_with_path(named, tree, *rest, is_leaf=is_leaf)


def count(tree: PyTree) -> int:
  """Number of scalars in a tree of arrays or `ShapeDtypeStruct`s."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def merge(a: PyTree, b: PyTree | None) -> PyTree:
  """The union of two nested dicts without common leaves. `b` may be empty or None."""
  if not b:
    return a
  both = {k: merge(a[k], b[k]) for k in a.keys() & b.keys()}
  return {**a, **b, **both}


def split(
  tree: PyTree, chosen: Collection[str], is_leaf: IsLeaf | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits a nested dict by path. `merge` undoes it.

  Args:
    tree: A nested dict.
    chosen: Paths of the leaves that go into the first result.
    is_leaf: As in `jax.tree.map`.

  Returns:
    (leaves whose paths are in `chosen`, all other leaves), both nested dicts.
  """
  named = flatten(tree, is_leaf=is_leaf)
  return (
    unflatten({path: leaf for path, leaf in named.items() if path in chosen}),
    unflatten({path: leaf for path, leaf in named.items() if path not in chosen}),
  )
