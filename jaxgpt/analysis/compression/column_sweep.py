"""Pruning and rounding with compensation: SparseGPT (arXiv:2301.00774), GPTQ (arXiv:2210.17323).

Both replace the weights of one input after the other by sparser or coarser ones, and change the
weights of the inputs that follow so that the output changes least. With H the products of pairs of
inputs, summed over calibration tokens, replacing w_j by q_j changes the rest by

  w_k -= (w_j - q_j) / [H^-1]_jj [H^-1]_jk        for k > j, H over the inputs from j on

(optimal brain surgeon). The inverses of all the H come from one Cholesky factor: with U'U = H^-1
and U upper triangular, [H^-1]_jk / [H^-1]_jj = U_jk / U_jj. Weights that follow in the same block
are changed at once, all others when the block is done, in one matmul.

I inputs, O outputs, G inputs of a group, B inputs of a block.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_BLOCK = 128  # of both papers
DAMP = 0.01  # of both papers: share of the mean of H's diagonal that is added to it

# f(weights of a group [G, O], diagonal of U [G]) -> what `replace` reads, any array
Prepare = Callable[[jax.Array, jax.Array], jax.Array]
# f(weights of an input [O], the group's result of `prepare`, index in the group) -> new weights
Replace = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Swept(NamedTuple):
  """The result of a sweep.

  Attributes:
    weight_IO: The new weights.
    prepared: The result of `prepare` for each group, stacked.
  """

  weight_IO: jax.Array
  prepared: jax.Array


def block_of(inputs: int, group: int) -> int:
  """The number of inputs in a block: at most 128 (or one group), a multiple of the group.

  Args:
    inputs: I, a multiple of `group`.
    group: G.
  """
  sizes = range(group, max(_BLOCK, group) + 1, group)
  return max(size for size in sizes if inputs % size == 0)


@functools.partial(jax.jit, static_argnames=("group", "block", "prepare", "replace"))
def sweep(
  weight_IO: jax.Array,
  products_II: jax.Array,
  *,
  group: int,
  block: int,
  prepare: Prepare,
  replace: Replace,
) -> Swept:
  """Replaces the weights input by input.

  Args:
    weight_IO: float32 weights.
    products_II: H. Inputs that were always zero get the weight 0.
    group: G. A group that is larger than a block is prepared before the sweep, from the weights as
      they are.
    block: B, from `block_of`. With a group of all inputs, any divisor of I.
    prepare: Called with each group when the sweep reaches it.
    replace: Called with each input.
  """
  inputs, outputs = weight_IO.shape
  dead_I = jnp.diag(products_II) == 0
  weight_IO = jnp.where(dead_I[:, None], 0.0, weight_IO)
  upper_II = _upper(products_II, dead_I)
  ahead = group > block
  fixed = prepare(weight_IO, jnp.diag(upper_II)) if ahead else None
  in_block = 1 if ahead else block // group

  def one_block(start: jax.Array, carry: Swept) -> Swept:
    weight_IO, prepared = carry
    rows_BO = jax.lax.dynamic_slice(weight_IO, (start, 0), (block, outputs))
    upper_BI = jax.lax.dynamic_slice(upper_II, (start, 0), (block, inputs))
    upper_BB = jax.lax.dynamic_slice(upper_BI, (0, start), (block, block))
    errors_BO = jnp.zeros_like(rows_BO)

    def one_input(j: jax.Array, carry: tuple) -> tuple:
      rows_BO, errors_BO, ready, first = carry
      d = upper_BB[j, j]
      new_O = replace(rows_BO[j], ready, j - first)
      error_O = (rows_BO[j] - new_O) / d
      after_B = jnp.where(jnp.arange(block) > j, upper_BB[j], 0.0)
      rows_BO = (rows_BO - after_B[:, None] * error_O).at[j].set(new_O)
      return rows_BO, errors_BO.at[j].set(error_O), ready, first

    def one_group(g: jax.Array, carry: tuple) -> tuple:
      rows_BO, errors_BO, prepared = carry
      size = block if ahead else group
      first = g * size
      if fixed is None:
        group_GO = jax.lax.dynamic_slice(rows_BO, (first, 0), (size, outputs))
        diagonal_G = jax.lax.dynamic_slice(jnp.diag(upper_BB), (first,), (size,))
        ready = prepare(group_GO, diagonal_G)
        prepared = prepared.at[(start + first) // size].set(ready)
      else:
        ready, first = fixed, -start  # the index in the group is that of the input
      steps = (g * size, (g + 1) * size)
      rows_BO, errors_BO, _, _ = jax.lax.fori_loop(
        *steps, one_input, (rows_BO, errors_BO, ready, first)
      )
      return rows_BO, errors_BO, prepared

    rows_BO, errors_BO, prepared = jax.lax.fori_loop(
      0, in_block, one_group, (rows_BO, errors_BO, prepared)
    )
    after_BI = jnp.where(jnp.arange(inputs) >= start + block, upper_BI, 0.0)
    weight_IO = weight_IO - after_BI.T @ errors_BO
    return Swept(jax.lax.dynamic_update_slice(weight_IO, rows_BO, (start, 0)), prepared)

  if fixed is None:
    shape = jax.eval_shape(prepare, weight_IO[:group], jnp.diag(upper_II)[:group])
    prepared = jnp.zeros((inputs // group, *shape.shape), shape.dtype)
  else:
    prepared = fixed[None]
  step = lambda b, carry: one_block(b * block, carry)
  return jax.lax.fori_loop(0, inputs // block, step, Swept(weight_IO, prepared))


def _upper(products_II: jax.Array, dead_I: jax.Array) -> jax.Array:
  """U, the upper Cholesky factor of the inverse of the damped H."""
  every_I = jnp.arange(len(dead_I))
  diagonal_I = jnp.where(dead_I, 1.0, jnp.diag(products_II))
  damp = DAMP * jnp.diag(products_II).mean()
  h_II = products_II.at[every_I, every_I].set(diagonal_I + damp)
  inverse_II = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(h_II), True), jnp.eye(len(dead_I)))
  return jnp.linalg.cholesky((inverse_II + inverse_II.T) / 2).T
