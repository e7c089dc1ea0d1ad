"""Bytes of weights and of their gradients that devices exchange in a step."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import ml_collections

from jaxgpt.model import stacks
from jaxgpt.parallel import sharding
from jaxgpt.plan import per_device
from jaxgpt.plan.per_device import Counts, Weight

_FLOAT32 = 4
# Mesh axes that shard tokens: devices along them have other tokens, and sum gradients.
_TOKEN_AXES = (*sharding.FIXED.mesh_axes("rows"), *sharding.FIXED.mesh_axes("length"))


class Traffic(NamedTuple):
  """Bytes on one device.

  Attributes:
    gathered: Weights, after they are gathered over fsdp once.
    scattered: Gradients of these weights, before each device keeps the sum of its shard. Sums of
      the shards over further axes are smaller, and left out.
    summed: Gradients of other weights that are summed over devices, all of which keep the sum.
  """

  gathered: float = 0.0
  scattered: float = 0.0
  summed: float = 0.0

  def times(self, n: float) -> "Traffic":
    """The traffic of n passes."""
    return Traffic(*(n * x for x in self))

  def plus(self, other: "Traffic") -> "Traffic":
    """The sum of two."""
    return Traffic(*(a + b for a, b in zip(self, other, strict=True)))


def of_step(c: ml_collections.ConfigDict, sizes: Mapping[str, int], counts: Counts) -> Traffic:
  """The traffic of a step.

  Args:
    c: A resolved config.
    sizes: Sizes of the mesh axes, {axis: size}.
    counts: The model's weights, from `per_device.count`.

  Raises:
    UserError: The layers or the rows do not divide into the pipeline stages.
  """
  pipe = stacks.pipeline_of(c, sizes)
  ticks = pipe.ticks if pipe else 1  # the layers of a stage are gathered for each
  found = of(c, sizes, counts.layers).times(ticks).plus(of(c, sizes, counts.others))
  return found.times(c.optim.accumulate)


def of(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], weights: tuple[Weight, ...]
) -> Traffic:
  """The traffic of one forward and backward pass over some weights. Args as in `of_step`."""
  itemsizes = per_device.itemsize(c.model), _gradient_itemsize(c.model)
  return _of(weights, tuple(sizes.items()), *itemsizes)


@functools.cache  # the search asks for the same few meshes thousands of times
def _of(
  weights: tuple[Weight, ...], axes: tuple[tuple[str, int], ...], itemsize: int, gradient: int
) -> Traffic:
  sizes, out = dict(axes), Traffic()
  for w in weights:
    held, whole = w.entries(sizes), w.entries(sizes, gathered=True)
    size = _of_gradient(w, itemsize, gradient)
    if whole > held:
      out = out.plus(Traffic(whole * (w.itemsize if w.is_code else itemsize), whole * size))
    elif w.replicated(sizes, _TOKEN_AXES):
      out = out.plus(Traffic(summed=held * size))
  return out


def summed_over(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], counts: Counts, axis: str
) -> float:
  """Bytes of the gradients on one device that are summed over a mesh axis. Args as in `of_step`."""
  itemsizes = per_device.itemsize(c.model), _gradient_itemsize(c.model)
  weights = (w for w in counts.layers + counts.others if w.replicated(sizes, (axis,)))
  return sum(w.entries(sizes) * _of_gradient(w, *itemsizes) for w in weights)


def _gradient_itemsize(m: ml_collections.ConfigDict) -> int:
  return _FLOAT32 if m.grad_dtype == "float32" else per_device.itemsize(m)


def _of_gradient(w: Weight, itemsize: int, gradient: int) -> int:
  """Bytes of an entry of a weight's gradient as it is reduced, 0 if the weight is not trained.

  Args:
    w: The weight.
    itemsize: Bytes of an activation. Experts have gradients of this size, see `model.grad_dtype`.
    gradient: Bytes of other weights' gradients.
  """
  return w.trained * (itemsize if "experts" in w.axes else gradient)
