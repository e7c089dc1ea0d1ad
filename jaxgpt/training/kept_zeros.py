"""Pruning in training (`optim.prune`), and training of pruned models (`optim.keep_zeros`).

In both, weights that are zero stay zero.

The mask is not stored. It is the weights themselves: a weight that is zero before a step gets no
gradient and no update, so it is zero after the step. The mask therefore has no state that could be
lost, and a resumed run has the same one on any mesh. A trained weight that an update happens to set
to exactly zero stays there too, about one in 2^24 changes of sign.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from jaxgpt import tree
from jaxgpt.errors import UserError
from jaxgpt.parallel import sharding
from jaxgpt.tree import PyTree


def keeping_zeros(tx: optax.GradientTransformation, axes: PyTree) -> optax.GradientTransformation:
  """An optimizer that changes no weight that is zero. Norms and biases are not held.

  Args:
    tx: The optimizer, with weight decay and learning rate.
    axes: Tree of logical axes of the trained parameters.
  """
  is_weight = jax.tree.map(sharding.is_weight, axes, is_leaf=sharding.is_axes)

  def live(values: PyTree, params: PyTree) -> PyTree:
    return jax.tree.map(
      lambda held, v, p: jnp.where(p == 0, 0, v) if held else v, is_weight, values, params
    )

  def update(
    grads: PyTree, state: optax.OptState, params: PyTree | None = None, **extra: Any
  ) -> tuple[PyTree, optax.OptState]:
    updates, state = tx.update(live(grads, params), state, params, **extra)
    return live(updates, params), state

  return optax.GradientTransformation(tx.init, update)


class GradualState(NamedTuple):
  """State of `gradual`: `step`, updates so far, and `inner`, the state of the optimizer."""

  step: jax.Array
  inner: optax.OptState


def sparsity_at(c_prune: ml_collections.ConfigDict, step: jax.Array) -> jax.Array:
  """The share of zeros after a step: s (1 - (1 - x)^3), x from 0 at `start` to 1 at `end`.

  Source: arXiv:1710.01878, equation 1.

  Args:
    c_prune: The config's `optim.prune` section.
    step: Updates before this one.
  """
  x = jnp.clip((step - c_prune.start) / (c_prune.end - c_prune.start), 0, 1)
  return c_prune.sparsity * (1 - (1 - x) ** 3)


def gradual(
  tx: optax.GradientTransformation, c_prune: ml_collections.ConfigDict, matrices: PyTree
) -> optax.GradientTransformation:
  """An optimizer that sets the smallest weights of each matrix of a layer to zero, more and more.

  It prunes every `every` updates from `start` to `end`. In between, and after `end`, zeros must be
  held by `keeping_zeros`.

  Args:
    tx: The optimizer, with weight decay and learning rate.
    c_prune: The config's `optim.prune` section.
    matrices: Tree of bools: whether a parameter is a stack of matrices of layers.
  """

  def update(
    grads: PyTree, state: GradualState, params: PyTree | None = None, **extra: Any
  ) -> tuple[PyTree, GradualState]:
    updates, inner = tx.update(grads, state.inner, params, **extra)
    step = state.step
    share = sparsity_at(c_prune, step)
    since = step - c_prune.start
    due = (since >= 0) & (step <= c_prune.end)
    due &= (since % c_prune.every == 0) | (step == c_prune.end)

    def pruned(updates: PyTree) -> PyTree:
      one = lambda is_matrix, u, p: jnp.where(smallest(p + u, share), -p, u) if is_matrix else u
      return jax.tree.map(one, matrices, updates, params)

    updates = jax.lax.cond(due, pruned, lambda updates: updates, updates)
    return updates, GradualState(step + 1, inner)

  return optax.GradientTransformation(
    lambda params: GradualState(jnp.zeros((), jnp.int32), tx.init(params)), update
  )


def smallest(weight: jax.Array, share: jax.Array) -> jax.Array:
  """True for the `share` of the weights of each layer with the smallest magnitudes.

  Args:
    weight: [layers, ...].
    share: Scalar. The number of weights is rounded to nearest.
  """
  size = jnp.abs(weight).reshape(len(weight), -1)
  count = jnp.round(share * size.shape[1]).astype(jnp.int32)
  limit = jnp.sort(size, axis=1)[:, jnp.maximum(count - 1, 0)]
  return ((size <= limit[:, None]) & (count > 0)).reshape(weight.shape)


def describe(given: Mapping[str, jax.Array], axes: PyTree, source: str) -> str:
  """A line on the weights that a new run keeps at zero.

  Args:
    given: {path: array} of the initial weights that `init_from` has.
    axes: Tree of logical axes of the trained parameters.
    source: The run's `init_from`.

  Raises:
    UserError: None of them is zero, so there is nothing to keep.
  """
  names = tree.flatten(axes, is_leaf=sharding.is_axes)
  held = {p: x for p, x in given.items() if p in names and sharding.is_weight(names[p])}
  counts = jax.device_get({p: (x == 0).sum() for p, x in held.items()})
  zeros, total = sum(map(int, counts.values())), sum(x.size for x in held.values())
  if not zeros:
    raise UserError(
      f"optim.keep_zeros=True has no effect: init_from={source!r} has no weight that is zero; "
      "leave it at False, or start from a run that jaxgpt prune made"
    )
  return f"keeps {zeros:,} of {total:,} weights at zero ({zeros / total:.1%})"
