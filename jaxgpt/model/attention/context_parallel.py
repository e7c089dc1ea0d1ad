"""Context parallelism: in which order the tokens of a row are cut over devices.

With n devices a row is 2n chunks. Under a causal mask device i holds chunks i and 2n-1-i, an early
and a late one (Llama 3, arXiv:2407.21783, section 3.3.2), so that all devices compute equally much;
`balance` puts tokens in that order, once, before the model reads them. `ring` and `neighbours` let
the devices' tokens meet. Their arrays have tokens on axis 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxgpt.model.attention import blockwise
from jaxgpt.parallel import sharding

T_AXIS = 2


class Plan(NamedTuple):
  """How the tokens of a row meet.

  Attributes:
    kernel: a `pairs.Kernel`.
    causal, window: see `ops.visible`; under a causal mask tokens are in the order of `balance`.
    axis, size: the mesh axis that rows are cut over, and its devices.
    name: of the output and its normaliser, for remat policies.
  """

  kernel: blockwise.Kernel
  causal: bool
  window: int | None
  axis: str
  size: int
  name: str


def parts(length):
  """How many devices of the mesh that `jax.set_mesh` has set share a row of so many tokens."""
  mesh = jax.sharding.get_abstract_mesh()
  n = 1 if mesh.empty else sharding.FIXED.num_shards(mesh, "length")
  return n if length % (2 * n) == 0 else 1


def chunks(n, causal):
  """[n, 2]: the two of a row's 2n chunks that each device holds."""
  if not causal:
    return np.arange(2 * n).reshape(n, 2)
  return np.stack([np.arange(n), 2 * n - 1 - np.arange(n)], axis=1)


def balance(x, axis=1):
  """Tokens of rows in the order in which a causal model has them on this mesh.

  Args:
    x: an array with tokens on `axis`, or None.
  """
  return _reordered(x, axis, lambda order: order)


def restore(x, axis=1):
  """The inverse of `balance`."""
  return _reordered(x, axis, np.argsort)


def _reordered(x, axis, which):
  n = 1 if x is None else parts(x.shape[axis])
  if n == 1:
    return x
  cut = x.reshape(*x.shape[:axis], 2 * n, -1, *x.shape[axis + 1 :])
  x = jnp.take(cut, which(chunks(n, True).reshape(-1)), axis=axis).reshape(x.shape)
  of_tokens = sharding.FIXED.spec(("length",))[0]
  return jax.lax.with_sharding_constraint(
    x, P(*(of_tokens if i == axis else P.UNCONSTRAINED for i in range(x.ndim)))
  )


def mask_of(plan, ids_BT, all_ids_BS):
  """Which tokens of the whole row each of a device's tokens reads; inside of `jax.shard_map`.

  Args:
    plan: a `Plan`.
    ids_BT, all_ids_BS: segments of the device's tokens, and of all in their order.

  Returns:
    [B, T, S] bool.
  """
  size = ids_BT.shape[1] // 2
  places = chunks(plan.size, plan.causal)[..., None] * size + np.arange(size)
  mine = jnp.asarray(places.reshape(plan.size, -1))[jax.lax.axis_index(plan.axis)]
  distance = mine[:, None] - places.reshape(-1)
  mask = (ids_BT[:, :, None] == all_ids_BS[:, None]) & (all_ids_BS[:, None] != 0)
  if plan.causal:
    mask &= distance >= 0
  return mask if plan.window is None else mask & (jnp.abs(distance) < plan.window)


def halves(x):
  """The two chunks of a device's tokens."""
  C = x.shape[T_AXIS] // 2
  return x[:, :, :C], x[:, :, C:]


def in_turn(*xs):
  """The same arrays, none before the others: else a compiler runs all blocks before it adds them up,
  and what they give has to fit in memory together."""
  return jax.lax.optimization_barrier(xs)
