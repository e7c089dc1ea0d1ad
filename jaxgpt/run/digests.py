"""Digests of arrays, which show that a value has changed.

A digest is two sums over an array's 32-bit words, modulo 2^32:

  sum of word * (2 position + 1)              odd weights: a change of any one word changes it
  sum of mixed(word) * mixed(position)        tells apart what the first sum does not

Sums of integers do not depend on their order, so a digest does not depend on how an array is
sharded. It finds accidents, and is no protection against an attacker.

There are two ways to compute it, with the same result. `of` sums on the devices that hold an array.
A save may not keep the devices from training, so it copies the shards to the host, which it has to
do anyway, and sums there while training goes on:

  copied = on_host(arrays)     before training goes on and donates the arrays
  mine = sums(copied)          in another thread: the shards of this process
  text(copied, [mine, …])      the digests, from the sums of all processes
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import tree
from jaxgpt.tree import PyTree

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by the bytes of an element
_MIX = np.uint32(0x85EBCA6B)
_PIECE = 1 << 18  # words that are summed at a time on the host: they stay in the cache

Sums = list[tuple[int, int]]  # the two sums of each array, in the order of their paths


class HostArray(NamedTuple):
  """The shards of an array that this process has to digest, in host memory.

  Attributes:
    dtype: Of the array.
    shape: Of the whole array.
    shards: (first index along each axis, values) of each. Each shard is in one process's list only.
  """

  dtype: str
  shape: tuple[int, ...]
  shards: list[tuple[tuple[int, ...], np.ndarray]]


def of(arrays: PyTree) -> dict[str, str]:
  """{path: dtype and digest, such as 'float32 5ad1c07e12f4b9d0'} of the arrays of a tree.

  All processes that hold shards must call it.
  """
  leaves = {path: _placed(x) for path, x in tree.flatten(arrays).items()}
  sums = jax.device_get({path: _jitted(_place(x))(x) for path, x in leaves.items()})
  return {path: _text(str(x.dtype), sums[path]) for path, x in leaves.items()}


def on_host(arrays: PyTree) -> dict[str, HostArray]:
  """{path: shards on the host}. When this returns, the arrays may be donated.

  On a CPU the copies share memory with the arrays: the runtime gives memory that a NumPy array
  refers to to no other array, even if its own one is donated.
  """
  leaves = tree.flatten(arrays)
  mine = {path: _own_shards(x) for path, x in leaves.items()}
  for shards in mine.values():
    for _, data in shards:
      if isinstance(data, jax.Array):
        data.copy_to_host_async()
  return {
    path: HostArray(str(x.dtype), x.shape, [(first, np.asarray(d)) for first, d in mine[path]])
    for path, x in leaves.items()
  }


def _own_shards(
  x: jax.Array | np.ndarray,
) -> list[tuple[tuple[int, ...], jax.Array | np.ndarray]]:
  """(first index along each axis, shard) of the shards that this process digests."""
  whole = [((0,) * x.ndim, x)] if jax.process_index() == 0 else []
  if not isinstance(x, jax.Array):
    return whole
  if x.is_fully_addressable and jax.process_count() > 1:
    return whole  # each process has a copy
  return [
    (tuple(axis.start or 0 for axis in shard.index), shard.data)
    for shard in x.addressable_shards
    if shard.replica_id == 0
  ]


def sums(copied: Mapping[str, HostArray]) -> Sums:
  """The sums over the shards of this process, computed on the host."""
  out = []
  for path in sorted(copied):
    array, first, second = copied[path], 0, 0
    for start, data in array.shards:
      whole = np.ascontiguousarray(data).reshape(data.shape)
      whole = whole.view(f"uint{8 * data.dtype.itemsize}")
      for words, position in _pieces(whole, start, array.shape):
        mixed, place = words ^ (words >> 15), position ^ (position >> 7)
        first += 2 * int(np.dot(words, position)) + int(words.sum(dtype=np.uint32))
        second += int(_MIX) * int(np.dot(mixed, place))
    out.append((first % 2**32, second % 2**32))
  return out


def _pieces(
  words: np.ndarray, start: Sequence[int], shape: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(words, their positions in the whole array) of a shard, both flat and uint32, in pieces.

  Args:
    words: The shard, contiguous.
    start: Its first index along each axis.
    shape: Shape of the whole array.
  """
  if words.size > _PIECE:
    axis = next(axis for axis, length in enumerate(words.shape) if length > 1)
    half = words.shape[axis] // 2
    before, after = np.split(words, [half], axis)
    yield from _pieces(before, start, shape)
    yield from _pieces(after, [s + half * (i == axis) for i, s in enumerate(start)], shape)
    return
  position = np.zeros((), np.uint32)
  for first, length, size in zip(start, words.shape, shape, strict=True):
    along = np.arange(first, first + length, dtype=np.uint32)
    position = position[..., None] * np.uint32(size) + along
  yield words.reshape(-1).astype(np.uint32, copy=False), position.reshape(-1)


def text(copied: Mapping[str, HostArray], parts: Sequence[Sums]) -> dict[str, str]:
  """The digests, as `of` gives them.

  Args:
    copied: From `on_host`.
    parts: The `sums` of all processes.
  """
  total = np.array(parts, np.uint64).sum(axis=0, dtype=np.uint64) % 2**32
  found = dict(zip(sorted(copied), total, strict=True))
  return {path: _text(array.dtype, found[path]) for path, array in copied.items()}


def _text(dtype: str, sums: Sequence[int] | np.ndarray) -> str:
  return f"{dtype} {''.join(f'{int(n):08x}' for n in sums)}"


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
  mixed = (words ^ (words >> 15)) * _MIX
  return jnp.stack(
    [(words * (2 * position + 1)).sum(), (mixed * (position ^ (position >> 7))).sum()]
  )
