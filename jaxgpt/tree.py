"""Pytrees whose leaves are known by their path, such as 'layers/attn/q'."""

import math

import jax


def path_name(path):
  """'layers/attn/q' of a key path as `jax.tree_util` gives it."""
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(tree, is_leaf=None):
  """{path: leaf} in tree order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return {path_name(path): leaf for path, leaf in leaves}


def unflatten(named):
  """The nested dict of {path: leaf}."""
  out = {}
  for path, leaf in named.items():
    *parents, name = path.split("/")
    node = out
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return out


def map_named(f, tree, *rest, is_leaf=None):
  """Like `jax.tree.map`, but `f` takes the leaf's path first."""
  named = lambda path, *leaves: f(path_name(path), *leaves)
  return jax.tree_util.tree_map_with_path(named, tree, *rest, is_leaf=is_leaf)


def count(tree):
  """Number of scalars in a tree of arrays or `ShapeDtypeStruct`s."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def merge(a, b):
  """The union of two nested dicts without common leaves; `b` may be empty or None."""
  if not b:
    return a
  both = {k: merge(a[k], b[k]) for k in a.keys() & b.keys()}
  return {**a, **b, **both}


def split(tree, chosen, is_leaf=None):
  """Two nested dicts: the leaves whose paths are in `chosen`, and the others; `merge` undoes it."""
  named = flatten(tree, is_leaf=is_leaf)
  return (
    unflatten({path: leaf for path, leaf in named.items() if path in chosen}),
    unflatten({path: leaf for path, leaf in named.items() if path not in chosen}),
  )
