"""Digests of arrays, computed on the devices that hold them, which show that a value has changed.

A digest is two sums over an array's 32-bit words, modulo 2^32:

  sum of word * (2 position + 1)              odd weights: a change of any one word changes it
  sum of mixed(word) * mixed(position)        tells apart what the first sum does not

Sums of integers do not depend on their order, so a digest does not depend on how an array is
sharded. It finds accidents, and is no protection against an attacker.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import tree
from jaxgpt.tree import PyTree

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by the bytes of an element


def of(arrays: PyTree) -> dict[str, str]:
  """{path: dtype and digest, such as 'float32 5ad1c07e12f4b9d0'} of the arrays of a tree.

  All processes that hold shards must call it.
  """
  leaves = {path: _placed(x) for path, x in tree.flatten(arrays).items()}
  sums = jax.device_get({path: _jitted(_place(x))(x) for path, x in leaves.items()})
  text = lambda path: "".join(f"{int(n):08x}" for n in sums[path])
  return {path: f"{x.dtype} {text(path)}" for path, x in leaves.items()}


def changed(arrays: PyTree, digests: Mapping[str, str]) -> list[str]:
  """Paths of arrays whose values are not those that digests were computed of.

  Args:
    arrays: A tree. Paths without a digest, and arrays in another dtype, are passed over.
    digests: From `of`.
  """
  dtypes = {path: value.split()[0] for path, value in digests.items()}
  known = {p: x for p, x in tree.flatten(arrays).items() if dtypes.get(p) == str(x.dtype)}
  return [path for path, value in of(known).items() if value != digests[path]]


def _placed(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
  """An array on a mesh, or on the host: those of one device cannot be used next to a mesh."""
  on_mesh = isinstance(getattr(x, "sharding", None), jax.sharding.NamedSharding)
  return x if on_mesh else np.asarray(x)


def _place(x: jax.Array | np.ndarray) -> jax.sharding.Sharding | None:
  """Where the sums go: to all devices of a mesh, so that all processes can read them."""
  sharding = getattr(x, "sharding", None)
  if isinstance(sharding, jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return None


@functools.lru_cache(maxsize=16)
def _jitted(place: jax.sharding.Sharding | None) -> jax.stages.Wrapped:
  return jax.jit(_sums, out_shardings=place)


def _sums(x: jax.Array) -> jax.Array:
  """The two sums, [2] uint32."""
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  mixed = (words ^ (words >> 15)) * np.uint32(0x85EBCA6B)
  return jnp.stack(
    [(words * (2 * position + 1)).sum(), (mixed * (position ^ (position >> 7))).sum()]
  )
