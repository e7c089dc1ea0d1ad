"""8-bit matmuls of activations and weights by qwix, for chips that run them at twice the rate.

Operands are quantized when they are used, each channel (a token of the activations, an output of
the weight) scaled by its largest magnitude. Stored weights and activations keep their dtype.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.errors import optional

# (dtype of activations and weights, dtype of gradients)
TYPES = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}

_Dims = tuple[tuple[int, ...], tuple[int, ...]]  # dimensions of the two operands


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def times(x: jax.Array, w: jax.Array, num_in: int, kind: str, gradients: bool) -> jax.Array:
  """Multiplies x by a weight in 8 bits, over the last `num_in` dimensions of x and the first of w.

  The gradient is that of the product without rounding (straight-through estimator,
  arXiv:1308.3432).

  Args:
    x: Activations.
    w: float32 weight.
    num_in: Number of contracted dimensions.
    kind: A key of `TYPES`.
    gradients: Whether the two matmuls of the gradient run in 8 bits too.

  Returns:
    The product in x's dtype.

  Raises:
    UserError: qwix is not installed.
  """
  leading, ins = tuple(range(x.ndim - num_in)), tuple(range(num_in))
  inner = tuple(range(x.ndim - num_in, x.ndim))
  kept = (leading, tuple(range(num_in, w.ndim)))
  return _product(x, w.astype(x.dtype), (inner, ins), kept, (TYPES[kind][0],) * 2)


def _backward(num_in: int, kind: str, gradients: bool, saved: tuple, dy: jax.Array) -> tuple:
  x, w = saved
  narrow = w.astype(x.dtype)
  leading, outs = tuple(range(x.ndim - num_in)), tuple(range(num_in, w.ndim))
  of_dy = tuple(range(len(leading), dy.ndim))
  inner = tuple(range(len(leading), x.ndim))
  forward, backward = TYPES[kind] if gradients else (None, None)
  kept = (leading, tuple(range(num_in)))
  dx = _product(dy, narrow, (of_dy, outs), kept, (backward, forward))
  dw = _product(x, dy, (leading, leading), (inner, of_dy), (forward, backward))
  return dx.astype(x.dtype), dw.astype(w.dtype)


times.defvjp(
  lambda x, w, num_in, kind, gradients: (times(x, w, num_in, kind, gradients), (x, w)), _backward
)


def _product(
  a: jax.Array, b: jax.Array, contracted: _Dims, kept: _Dims, types: tuple[Any, Any]
) -> jax.Array:
  """`dot_general` of a and b, quantized to `types` (None: as they are) with scales along `kept`."""
  dims = (contracted, ((), ()))
  if types == (None, None):
    return jax.lax.dot_general(a, b, dims)
  qwix = optional("qwix", "quant", "model.quantize")
  a, b = (
    qwix.quantize(one, kind, channelwise_axes=axes)
    for one, kind, axes in zip((a, b), types, kept, strict=True)
  )
  return qwix.dot_general(a, b, dims)
