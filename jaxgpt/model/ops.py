"""The mathematics of the model: arrays in, arrays out, no parameters of its own.

B batch, T query position, S key position, D model.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, scale, bias, eps):
  """(x - mean) / sqrt(var + eps) * scale + bias over the last axis (arXiv:1607.06450).

  Args:
    x: [..., D] of any float dtype; the statistics are taken in float32.
    scale: [D].
    bias: [D], or None.
    eps: added to the variance.

  Returns:
    [..., D] in x's dtype.
  """
  return _layer_norm_fwd(x, scale, bias, eps)[0]


# The gradient is written out because the derived one makes XLA pass over x more often.
def _layer_norm_fwd(x, scale, bias, eps):
  x32 = x.astype(jnp.float32)
  mean = x32.mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.square(x32 - mean).mean(-1, keepdims=True) + eps)
  y = (x32 - mean) * inverse * scale
  return (y if bias is None else y + bias).astype(x.dtype), (x, mean, inverse, scale, bias)


def _layer_norm_bwd(eps, saved, dy):
  del eps
  x, mean, inverse, scale, bias = saved
  dy32 = dy.astype(jnp.float32)
  normed = (x.astype(jnp.float32) - mean) * inverse
  d = dy32 * scale
  dx = (d - d.mean(-1, keepdims=True) - normed * (d * normed).mean(-1, keepdims=True)) * inverse
  rows = tuple(range(x.ndim - 1))
  dscale = (dy32 * normed).sum(rows).astype(scale.dtype)
  dbias = None if bias is None else dy32.sum(rows).astype(bias.dtype)
  return dx.astype(x.dtype), dscale, dbias


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


def rms_norm(x, scale, eps):
  """x / sqrt(mean(x^2) + eps) * scale over the last axis (arXiv:1910.07467).

  Args:
    x: [..., D] of any float dtype; the statistics are taken in float32.
    scale: [D].
    eps: added to the mean square.

  Returns:
    [..., D] in x's dtype.
  """
  x32 = x.astype(jnp.float32)
  y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps) * scale
  return y.astype(x.dtype)


def times(x, w, num_in, *, wide_gradient, out_dtype=None):
  """x times a weight, over x's last and w's first `num_in` dimensions, in x's dtype.

  Args:
    x: activations.
    w: float32; cast before it is multiplied, and with that before it is gathered from devices.
    num_in: how many dimensions.
    wide_gradient: whether w's gradient leaves its matmul, and is summed over devices, in float32.
      Otherwise it is rounded to x's dtype before, which moves half of the bytes.
    out_dtype: of the result; None: x's.
  """
  if wide_gradient:
    return _wide_times(x, w, num_in, out_dtype)
  return jnp.tensordot(x, w.astype(x.dtype), num_in, preferred_element_type=out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _wide_times(x, w, num_in, out_dtype):
  return jnp.tensordot(x, w.astype(x.dtype), num_in, preferred_element_type=out_dtype)


def _wide_times_bwd(num_in, out_dtype, saved, dy):
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
def widely_summed(table_VD, narrow_VD, ids):
  """Rows `ids` of `narrow_VD`, a cast of `table_VD`, whose gradients are added up in float32."""
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


def materialized(x, what):
  """x, written to memory once instead of being computed anew inside each matmul that reads it.

  XLA's TPU compiler fuses elementwise work into the matmuls around it, which then run at half of
  their rate; and where the matmul of a weight's gradient asks for x with its tokens contiguous, the
  compiler copies all that x is made of into that layout. So x is written with its last dimension
  contiguous, as it is read everywhere else (docs/log.md).

  Args:
    x: any array.
    what: 'none', 'values' or 'gradients', of which the last is values too.
  """
  return x if what == "none" else _materialized(x, what == "gradients")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _materialized(x, gradient):
  del gradient
  return with_layout_constraint(jax.lax.optimization_barrier(x), Layout(tuple(range(x.ndim))))


_materialized.defvjp(
  lambda x, gradient: (_materialized(x, gradient), None),
  lambda gradient, _, dy: (jax.lax.optimization_barrier(dy) if gradient else dy,),
)


def dropout(x, rate, key):
  """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate).

  Args:
    x: any array.
    rate: in [0, 1).
    key: PRNG key, or None for no dropout.
  """
  if key is None or not rate:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def mean_of(x_BTD, real_BT):
  """Mean over the tokens of each row that are no padding: [B, D]."""
  weights = real_BT.astype(x_BTD.dtype)
  return jnp.einsum("BTD,BT->BD", x_BTD, weights) / jnp.maximum(weights.sum(-1, keepdims=True), 1)


def softcap(x, cap):
  """cap * tanh(x / cap) (Gemma 2, arXiv:2408.00118), or x where cap is None."""
  return x if cap is None else cap * jnp.tanh(x / cap)


# 0.5 (1 + tanh(u)) is sigmoid(2u), which costs an exp where XLA's CPU backend has a slow tanh; with
# its gradient written out only x is saved.
_GELU = 2 * (2 / math.pi) ** 0.5
_GELU_CUBIC = 0.044715


@jax.custom_vjp
def gelu(x):
  """x * Phi(x) in the tanh form of arXiv:1606.08415, as GPT-2 has it."""
  return _gelu_fwd(x)[0]


def _gelu_fwd(x):
  return x * _sigmoid(_GELU * x * (1 + _GELU_CUBIC * x * x)), x


def _gelu_bwd(x, dy):
  x2 = x * x
  s = _sigmoid(_GELU * x * (1 + _GELU_CUBIC * x2))
  return (dy * (s + x * s * (1 - s) * (_GELU * (1 + 3 * _GELU_CUBIC * x2))),)


def _sigmoid(x):
  return 1 / (1 + jnp.exp(-x))


gelu.defvjp(_gelu_fwd, _gelu_bwd)

ACTIVATIONS = {
  "gelu": gelu,
  "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
  "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # Primer, arXiv:2109.08668
}
