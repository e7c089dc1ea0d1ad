"""The mathematics of the model: functions from arrays to arrays, without parameters.

B batch, T position, D model, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from jaxgpt.config.remat import MEAN_SQUARE

DType = Any  # a NumPy dtype or its name

# Numbers of a float32 weight from which its gradient is written by hand. The derived gradient is
# the transpose of a product, which XLA gives to the slower of its two libraries on CPUs. Smaller
# products take no time, and round as they did in runs of earlier versions.
_LARGE = 2**16


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
  """Computes (x - mean) / sqrt(var + eps) * scale + bias over the last axis (arXiv:1607.06450).

  Args:
    x: [..., D] of any float dtype. Statistics are computed in float32.
    scale: [D].
    bias: [D], or None.
    eps: Added to the variance.

  Returns:
    [..., D] in x's dtype.
  """
  return _layer_norm_fwd(x, scale, bias, eps)[0]


# The gradient is written by hand: with the derived one XLA reads x from memory more often.
def _layer_norm_fwd(
  x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float
) -> tuple[jax.Array, tuple]:
  x32 = x.astype(jnp.float32)
  mean = x32.mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.square(x32 - mean).mean(-1, keepdims=True) + eps)
  y = (x32 - mean) * inverse * scale
  return (y if bias is None else y + bias).astype(x.dtype), (x, mean, inverse, scale, bias)


def _layer_norm_bwd(eps: float, saved: tuple, dy: jax.Array) -> tuple:
  del eps
  x, mean, inverse, scale, bias = saved
  dy32 = dy.astype(jnp.float32)
  normed = (x.astype(jnp.float32) - mean) * inverse
  d = dy32 * scale
  dx = (d - d.mean(-1, keepdims=True) - normed * (d * normed).mean(-1, keepdims=True)) * inverse
  leading = tuple(range(x.ndim - 1))
  dscale = (dy32 * normed).sum(leading).astype(scale.dtype)
  dbias = None if bias is None else dy32.sum(leading).astype(bias.dtype)
  return dx.astype(x.dtype), dscale, dbias


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Computes x / sqrt(mean(x^2) + eps) * scale over the last axis (arXiv:1910.07467).

  Args:
    x: [..., D] of any float dtype. Statistics are computed in float32.
    scale: [D].
    eps: Added to the mean square.

  Returns:
    [..., D] in x's dtype.
  """
  x32 = x.astype(jnp.float32)
  square = jnp.square(x32).mean(-1)
  if x.ndim == 3:  # [B, T, D]. Those of heads are many numbers, each quickly computed.
    square = checkpoint_name(square, MEAN_SQUARE)
  return (x32 * jax.lax.rsqrt(square[..., None] + eps) * scale).astype(x.dtype)


def times(
  x: jax.Array, w: jax.Array, num_in: int, *, wide_gradient: bool, out_dtype: DType | None = None
) -> jax.Array:
  """Multiplies x by a weight, over the last `num_in` dimensions of x and the first of w.

  Args:
    x: Activations.
    w: float32 weight. It is cast to x's dtype before the product, hence also before it is gathered
      from other devices.
    num_in: Number of contracted dimensions.
    wide_gradient: Whether the gradient of w leaves its matmul, and is summed over devices, in
      float32. Otherwise it is rounded to x's dtype first, which moves half of the bytes.
    out_dtype: dtype of the result. None: that of x.
  """
  if wide_gradient or (x.dtype == w.dtype == jnp.float32 and w.size >= _LARGE):
    return _wide_times(x, w, num_in, out_dtype)
  return jnp.tensordot(x, w.astype(x.dtype), num_in, preferred_element_type=out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _wide_times(x: jax.Array, w: jax.Array, num_in: int, out_dtype: DType | None) -> jax.Array:
  return jnp.tensordot(x, w.astype(x.dtype), num_in, preferred_element_type=out_dtype)


def _wide_times_bwd(num_in: int, out_dtype: DType | None, saved: tuple, dy: jax.Array) -> tuple:
  del out_dtype
  x, w = saved
  dy = dy.astype(x.dtype)
  num_rows, num_out = x.ndim - num_in, w.ndim - num_in
  last = lambda a: tuple(range(a.ndim - num_out, a.ndim))
  first = tuple(range(num_rows))
  dx = jax.lax.dot_general(dy, w.astype(x.dtype), ((last(dy), last(w)), ((), ())))
  dw = jax.lax.dot_general(x, dy, ((first, first), ((), ())), preferred_element_type=w.dtype)
  return dx, dw


_wide_times.defvjp(
  lambda x, w, num_in, out_dtype: (_wide_times(x, w, num_in, out_dtype), (x, w)), _wide_times_bwd
)


@jax.custom_vjp
def widely_summed(table_VD: jax.Array, narrow_VD: jax.Array, ids: jax.Array) -> jax.Array:
  """Looks up `ids` in an embedding table. The gradients of a token are summed in float32.

  Args:
    table_VD: float32 table, which receives the gradient.
    narrow_VD: The same table in the compute dtype, which is read.
    ids: Token ids of any shape.

  Returns:
    [..., D] in the dtype of `narrow_VD`.
  """
  del table_VD
  return jnp.take(narrow_VD, ids, axis=0)


widely_summed.defvjp(
  lambda table_VD, narrow_VD, ids: (
    widely_summed(table_VD, narrow_VD, ids),
    (table_VD, narrow_VD, ids),
  ),
  lambda saved, dy: (
    jnp.zeros_like(saved[0]).at[saved[2]].add(dy.astype(saved[0].dtype)),
    jnp.zeros_like(saved[1]),
    None,
  ),
)


def few_largest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """`jax.lax.top_k` for a small k: k passes over x, each local to the devices that hold its rows.

  For `top_k`, XLA's partitioner gathers x from all devices, except on TPUs.

  Args:
    x: [..., N], of which at least k are above -inf.
    k: Their number.

  Returns:
    (values, ids), [..., k] each: in descending order, of equal numbers the first one first.

  Raises:
    ValueError: k is larger than N.
  """
  if k > x.shape[-1]:
    raise ValueError(f"the {k} largest of {x.shape[-1]} numbers")
  columns = jnp.arange(x.shape[-1], dtype=jnp.int32)
  values, ids, taken = [], [], jnp.zeros(x.shape, bool)
  for _ in range(k):
    at = jnp.argmax(jnp.where(taken, -jnp.inf, x), axis=-1).astype(jnp.int32)
    here = columns == at[..., None]
    values.append(jnp.where(here, x, 0).sum(-1))
    ids.append(at)
    taken |= here
  return jnp.stack(values, -1), jnp.stack(ids, -1)


def materialized(x: jax.Array, what: str) -> jax.Array:
  """Returns x, written to memory once instead of recomputed inside each matmul that reads it.

  XLA's TPU compiler fuses elementwise work into the matmuls around it, which then run at half of
  their rate. And where the matmul of a weight gradient needs x with contiguous tokens, the compiler
  copies all inputs of x into that layout. So x is written with its last dimension contiguous, which
  all other readers need (docs/log.md).

  Args:
    x: Any array.
    what: 'none', 'values', or 'gradients' for values and gradients.
  """
  return x if what == "none" else _materialized(x, what == "gradients")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _materialized(x: jax.Array, gradient: bool) -> jax.Array:
  del gradient
  in_rows = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))
  x = jax.lax.optimization_barrier(x)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return in_rows(x)
  # Except on TPUs, XLA's partitioner may gather x from all devices for a fixed layout.
  return jax.lax.platform_dependent(x, tpu=in_rows, default=lambda x: x)


_materialized.defvjp(
  lambda x, gradient: (_materialized(x, gradient), None),
  lambda gradient, _, dy: (jax.lax.optimization_barrier(dy) if gradient else dy,),
)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate).

  Args:
    x: Any array.
    rate: Probability in [0, 1).
    key: PRNG key, or None for no dropout.
  """
  if key is None or not rate:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def mean_of(x_BTD: jax.Array, real_BT: jax.Array) -> jax.Array:
  """Mean over the tokens of each row that are not padding, [B, D]."""
  weights = real_BT.astype(x_BTD.dtype)
  return jnp.einsum("BTD,BT->BD", x_BTD, weights) / jnp.maximum(weights.sum(-1, keepdims=True), 1)


def last_of(x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
  """The last token of each row that is not padding, [B, D]; in a packed row, of its last document.

  Tokens may be in any order, such as that of `token_order.balance`.

  Args:
    x_BTD: Hidden states.
    positions_BT: Positions within each document.
    segments_BT: 1, 2, ... for the documents of a row, 0 for padding.
  """
  in_last_BT = segments_BT == segments_BT.max(-1, keepdims=True)
  at_B = jnp.where(in_last_BT, positions_BT, -1).argmax(-1)
  return jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)[:, 0]


def pooled(
  x_BTD: jax.Array, pooling: str, positions_BT: jax.Array, segments_BT: jax.Array
) -> jax.Array:
  """One vector per row, [B, D], as `model.pooling` says.

  Args:
    x_BTD: Hidden states.
    pooling: 'first', 'mean' or 'last'.
    positions_BT: Positions within each document.
    segments_BT: 1, 2, ... for the documents of a row, 0 for padding.
  """
  if pooling == "first":
    return x_BTD[:, 0]
  if pooling == "mean":
    return mean_of(x_BTD, segments_BT != 0)
  return last_of(x_BTD, positions_BT, segments_BT)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
  """Computes cap * tanh(x / cap) (Gemma 2, arXiv:2408.00118), or returns x if cap is None."""
  return x if cap is None else cap * jnp.tanh(x / cap)


# 0.5 (1 + tanh(u)) equals sigmoid(2u). It is computed with exp, because tanh is slow on XLA's CPU
# backend. The gradient is written by hand, so that only x is saved for it.
_GELU = 2 * (2 / math.pi) ** 0.5
_GELU_CUBIC = 0.044715


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Computes x * Phi(x) in the tanh approximation of arXiv:1606.08415, as GPT-2 does."""
  return _gelu_fwd(x)[0]


def _gelu_fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return x * _sigmoid(_GELU * x * (1 + _GELU_CUBIC * x * x)), x


def _gelu_bwd(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
  x2 = x * x
  s = _sigmoid(_GELU * x * (1 + _GELU_CUBIC * x2))
  return (dy * (s + x * s * (1 - s) * (_GELU * (1 + 3 * _GELU_CUBIC * x2))),)


def _sigmoid(x: jax.Array) -> jax.Array:
  return 1 / (1 + jnp.exp(-x))


gelu.defvjp(_gelu_fwd, _gelu_bwd)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": gelu,
  "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
  "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # Primer, arXiv:2109.08668
}
