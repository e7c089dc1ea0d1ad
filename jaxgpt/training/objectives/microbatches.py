"""Microbatches: a batch cut into parts that a step computes one after another.

B rows of a batch, A microbatches.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxgpt.parallel import sharding
from jaxgpt.tree import PyTree

# f(rows, key) -> (an array with a row for each row, sums over the rows)
OfRows: TypeAlias = Callable[[PyTree, jax.Array | None], tuple[jax.Array, PyTree]]


def split(batch: PyTree, number: int) -> PyTree:
  """Cuts a batch into microbatches: arrays [B, …] become [A, B / A, …].

  Row r goes to microbatch r % A, so that every data shard holds rows of every microbatch and none
  has to move.
  """
  return jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), batch)


def pinned(rows: PyTree) -> PyTree:
  """A microbatch with its rows over the data shards.

  Without this, XLA may shard the slices of a scanned dimension in other ways.
  """
  pin = lambda x: sharding.FIXED.constrain(x, "rows", *[None] * (x.ndim - 1))
  return jax.tree.map(pin, rows)


def mapped(
  f: OfRows, batch: PyTree, key: jax.Array | None, number: int
) -> tuple[jax.Array, PyTree]:
  """Applies a function to microbatches, whose activations are not kept for the backward pass.

  A loss of the outputs of all rows then has the activations of one microbatch in memory, since each
  is computed again for its gradient. This is the gradient cache of arXiv:2101.06983, section 3.2.

  Args:
    f: The function.
    batch: Tree of arrays [B, …].
    key: PRNG key, or None. Microbatch i gets fold_in(key, i).
    number: A. 1: `f` is applied to the whole batch, with the key itself.

  Returns:
    (the array of all rows [B, …], sums over all rows).
  """
  if number == 1:
    return f(batch, key)
  again = jax.checkpoint(f, prevent_cse=False)

  def body(carry: None, xs: Any) -> tuple[None, tuple[jax.Array, PyTree]]:
    i, rows = xs
    return carry, again(pinned(rows), None if key is None else jax.random.fold_in(key, i))

  _, (out, sums) = jax.lax.scan(body, None, (jnp.arange(number), split(batch, number)))
  out = pinned(out.swapaxes(0, 1).reshape(-1, *out.shape[2:]))
  return out, jax.tree.map(lambda x: x.sum(0), sums)
