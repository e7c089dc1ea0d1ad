"""The order of a row's tokens on the devices that share the row (context parallelism).

Under a causal mask late queries attend to many keys and early queries to few. If n devices took
contiguous shards of a row, the last one would compute most. So a row is cut into 2n chunks, and
device i holds chunks i and 2n-1-i (Llama 3, arXiv:2407.21783, section 3.3.2). For n = 4:

             row:  c0 c1   c2 c3   c4 c5   c6 c7
  balanced order:  c0 c7 | c1 c6 | c2 c5 | c3 c4
                   dev 0   dev 1   dev 2   dev 3

A chunk's query work is proportional to its number plus one half. The two chunks of each device add
up to the same amount.

`balance` permutes the tokens once, before the model reads them. `restore` is the inverse.

B batch, T token of a device, S token of the whole row.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxgpt.model.attention.spec import ContextParallel
from jaxgpt.parallel import sharding

T_AXIS = 2  # of the arrays of `ring` and `halo`, which have their tokens there

_Array = TypeVar("_Array", jax.Array, jax.Array | None)


def num_shards(length: int) -> int:
  """Number of devices that share a row of `length` tokens, on the mesh that `jax.set_mesh` has set.

  It is 1 if the length is not a multiple of twice the number of devices.
  """
  mesh = jax.sharding.get_abstract_mesh()
  n = 1 if mesh.empty else sharding.FIXED.num_shards(mesh, "length")
  return n if length % (2 * n) == 0 else 1


def chunks(n: int, causal: bool) -> np.ndarray:
  """The two of a row's 2n chunks that each device holds, [n, 2]."""
  if not causal:
    return np.arange(2 * n).reshape(n, 2)
  return np.stack([np.arange(n), 2 * n - 1 - np.arange(n)], axis=1)


def balance(x: _Array, axis: int = 1) -> _Array:
  """Permutes rows into the balanced order of a causal model on the current mesh.

  Args:
    x: Array with tokens on `axis`, or None.
    axis: The axis of tokens.
  """
  return _permuted(x, axis, lambda order: order)


def restore(x: _Array, axis: int = 1) -> _Array:
  """Inverts `balance`."""
  return _permuted(x, axis, np.argsort)


def _permuted(x: _Array, axis: int, to_index: Callable[[np.ndarray], np.ndarray]) -> _Array:
  if x is None or (n := num_shards(x.shape[axis])) == 1:
    return x
  cut = x.reshape(*x.shape[:axis], 2 * n, -1, *x.shape[axis + 1 :])
  x = jnp.take(cut, to_index(chunks(n, True).reshape(-1)), axis=axis).reshape(x.shape)
  of_tokens = sharding.FIXED.spec(("length",))[0]
  return jax.lax.with_sharding_constraint(
    x, P(*(of_tokens if i == axis else P.UNCONSTRAINED for i in range(x.ndim)))
  )


def device_mask(cp: ContextParallel, ids_BT: jax.Array, all_ids_BS: jax.Array) -> jax.Array:
  """Mask of this device's queries over the whole row, under `jax.shard_map`.

  Args:
    cp: How rows are sharded.
    ids_BT: Segments of this device's tokens.
    all_ids_BS: Segments of all tokens of the row, in the order of the devices.

  Returns:
    Boolean array [B, T, S].
  """
  size = ids_BT.shape[1] // 2
  # Positions in the row: [device, its two chunks, token] -> [device, token].
  positions = chunks(cp.size, cp.spec.causal)[..., None] * size + np.arange(size)
  own = jnp.asarray(positions.reshape(cp.size, -1))[jax.lax.axis_index(cp.axis)]
  distance = own[:, None] - positions.reshape(-1)
  mask = (ids_BT[:, :, None] == all_ids_BS[:, None]) & (all_ids_BS[:, None] != 0)
  if cp.spec.causal:
    mask &= distance >= 0
  window = cp.spec.window
  return mask if window is None else mask & (jnp.abs(distance) < window)


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The two chunks of a device's tokens, cut along `T_AXIS`."""
  C = x.shape[T_AXIS] // 2
  return x[:, :, :C], x[:, :, C:]
