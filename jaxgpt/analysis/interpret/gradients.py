"""Attribution to input tokens by gradients: saliency and integrated gradients.

B batch, T position, D model, Q quadrature points.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.analysis.interpret import taps
from jaxgpt.model import transformer
from jaxgpt.tree import PyTree

_AT_ONCE, _MOST = 16, 512  # quadrature points


class Integrated(NamedTuple):
  """Integrated gradients (Sundararajan et al., arXiv:1703.01365).

  Attributes:
    tokens: Share of each token in the difference, [B, T].
    value: What is explained, at the inputs, [B].
    baseline: The same at the baseline, [B].
    error: |sum of tokens - (value - baseline)|, largest of the batch. The method is complete: in
      exact arithmetic it is 0.
    points: Quadrature points that were used.
  """

  tokens: jax.Array
  value: jax.Array
  baseline: jax.Array
  error: float
  points: int


@functools.partial(jax.jit, static_argnames="model")
def saliency(
  model: transformer.Transformer, params: PyTree, inputs: taps.Inputs, measure: Any
) -> tuple[jax.Array, jax.Array]:
  """Gradients of a measure by the input embeddings.

  Args:
    model: From `taps.readable`.
    params: All its parameters.
    inputs: The batch.
    measure: A pytree that is called with the logits, such as `patching.Answer`.

  Returns:
    (norm of the gradient [B, T], gradient times embedding [B, T]).
  """
  embed = taps.forward(model, params, inputs, ("embed",)).at["embed"]
  gradient = _gradient(model, params, inputs, measure, embed)
  return jnp.linalg.norm(gradient, axis=-1), (gradient * embed).sum(-1)


def _measured(
  model: transformer.Transformer,
  params: PyTree,
  inputs: taps.Inputs,
  measure: Any,
  embed_BTD: jax.Array,
) -> jax.Array:
  """The measure [B] of inputs whose embeddings are replaced."""
  edits = {"embed": taps.Edit(True, embed_BTD)}
  return measure(taps.forward(model, params, inputs, (), edits).output.logits)


def _gradient(model: Any, params: PyTree, inputs: Any, measure: Any, embed: jax.Array) -> jax.Array:
  # Rows do not read each other, so the gradient of the sum has that of each row.
  return jax.grad(lambda x: _measured(model, params, inputs, measure, x).sum())(embed)


@functools.partial(jax.jit, static_argnames="model")
def _path(
  model: transformer.Transformer,
  params: PyTree,
  inputs: taps.Inputs,
  baseline: taps.Inputs,
  measure: Any,
  at_Q: jax.Array,
  weight_Q: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(sum over some points [B, T], measure of the inputs [B], of the baseline [B])."""
  start = taps.forward(model, params, baseline, ("embed",)).at["embed"]
  end = taps.forward(model, params, inputs, ("embed",)).at["embed"]

  def add(total: jax.Array, point: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    at, weight = point
    gradient = _gradient(model, params, inputs, measure, start + at * (end - start))
    return total + weight * gradient, None

  total, _ = jax.lax.scan(add, jnp.zeros_like(end), (at_Q, weight_Q))
  value, before = (_measured(model, params, inputs, measure, x) for x in (end, start))
  return (total * (end - start)).sum(-1), value, before


def integrated(
  model: transformer.Transformer,
  params: PyTree,
  inputs: taps.Inputs,
  baseline: taps.Inputs,
  measure: Any,
  tolerance: float = 1e-3,
) -> Integrated:
  """Integrates gradients along the straight line from a baseline's embeddings to the inputs'.

  The integral is a Gauss-Legendre sum, with twice the points until it is complete to `tolerance`.

  Args:
    model: From `taps.readable`.
    params: All its parameters.
    inputs: The batch.
    baseline: A batch of the same shape that stands for "no information", such as one padding or
      separator token in each position. Zeros would not do: a norm makes the model jump there.
    measure: A pytree that is called with the logits, such as `patching.Answer`.
    tolerance: Largest error to stop at, in the units of the measure.

  Returns:
    The integrated gradients. `error` says whether the tolerance was reached.
  """
  points = _AT_ONCE
  while True:
    x, w = np.polynomial.legendre.leggauss(points)
    tokens = jnp.zeros(inputs.tokens.shape)
    for i in range(0, points, _AT_ONCE):  # one compiled program, however many points there are
      at, weight = (v[i : i + _AT_ONCE].astype(np.float32) for v in ((x + 1) / 2, w / 2))
      part, value, start = _path(model, params, inputs, baseline, measure, at, weight)
      tokens += part
    error = float(jnp.abs(tokens.sum(-1) - (value - start)).max())
    if error <= tolerance or points >= _MOST:
      return Integrated(tokens, value, start, error, points)
    points *= 2
