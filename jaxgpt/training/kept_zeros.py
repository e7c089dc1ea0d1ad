"""Training of pruned models: weights that are zero stay zero (`optim.keep_zeros`).

The mask is not stored. It is the weights themselves: a weight that is zero before a step gets no
gradient and no update, so it is zero after the step. The mask therefore has no state that could be
lost, and a resumed run has the same one on any mesh. A trained weight that an update happens to set
to exactly zero stays there too, about one in 2^24 changes of sign.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
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
