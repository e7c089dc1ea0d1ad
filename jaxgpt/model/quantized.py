"""Products of activations and weights in eight bits, by qwix, for chips that do these twice as
fast.

Each number is scaled by the largest of its row (of a token for activations, of an output for
weights) when it is used; what is kept, of weights and of activations, stays as wide as it was.
"""

import functools

import jax
import jax.numpy as jnp

from jaxgpt.errors import UserError

# Of activations and weights, and of gradients.
TYPES = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def times(x, w, num_in, kind, gradients):
  """x times a weight in eight bits, over x's last and w's first `num_in` dimensions, in x's dtype.

  Args:
    x: activations.
    w: float32.
    num_in: how many dimensions.
    kind: a key of `TYPES`.
    gradients: whether the two products of the gradient are in eight bits too. In any case it is
      that of the unrounded product (straight-through, arXiv:1308.3432).

  Raises:
    UserError: qwix is not installed.
  """
  rows, ins = tuple(range(x.ndim - num_in)), tuple(range(num_in))
  inner = tuple(range(x.ndim - num_in, x.ndim))
  return _product(
    x, w.astype(x.dtype), (inner, ins), (rows, tuple(range(num_in, w.ndim))), (TYPES[kind][0],) * 2
  )


def _backward(num_in, kind, gradients, saved, dy):
  x, w = saved
  narrow = w.astype(x.dtype)
  rows, outs = tuple(range(x.ndim - num_in)), tuple(range(num_in, w.ndim))
  of_dy = tuple(range(len(rows), dy.ndim))
  inner = tuple(range(len(rows), x.ndim))
  forward, backward = TYPES[kind] if gradients else (None, None)
  dx = _product(dy, narrow, (of_dy, outs), (rows, tuple(range(num_in))), (backward, forward))
  dw = _product(x, dy, (rows, rows), (inner, of_dy), (forward, backward))
  return dx.astype(x.dtype), dw.astype(w.dtype)


times.defvjp(
  lambda x, w, num_in, kind, gradients: (times(x, w, num_in, kind, gradients), (x, w)), _backward
)


def _product(a, b, contracted, kept, types):
  """`dot_general` of a and b, in the types given (None: as they are); scales along `kept`."""
  dims = (contracted, ((), ()))
  if types == (None, None):
    return jax.lax.dot_general(a, b, dims)
  try:
    import qwix
  except ImportError as e:
    raise UserError("model.quantize needs qwix: pip install 'jaxgpt[quant]'") from e
  a, b = (
    qwix.quantize(one, kind, channelwise_axes=axes)
    for one, kind, axes in zip((a, b), types, kept, strict=True)
  )
  return qwix.dot_general(a, b, dims)
