"""Attention as batched matmuls, the fastest implementation on XLA's CPU backend.

B batch, T query position, S key position, N heads, K key/value heads, G = N / K, H head size.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.model.attention.masks import MASKED

# Queries are processed in chunks. Smaller chunks compute less of the masked upper triangle, but
# make the matmuls smaller:
#
#             keys
#   chunk 0   # . . .     Chunk i multiplies only the keys of chunks 0 to i (#), so that of the
#   chunk 1   # # . .     square about half is never computed.
#   chunk 2   # # # .
#   chunk 3   # # # #
_CHUNK = 128  # queries
_MAX_CHUNKS = 8  # each is compiled separately; a divisor of _CHUNK, so that chunks are equal


class _Form(NamedTuple):
  """Static options: factor on the logits, softcap or None, number of chunks of queries."""

  scale: float
  softcap: float | None
  chunks: int


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask_BTS: jax.Array,
  *,
  scale: float,
  softcap: float | None = None,
  causal: bool = False,
) -> jax.Array:
  """Computes grouped-query attention with heads as a batch dimension of plain matmuls.

  The gradient of the softmax is written by hand. If the mask is causal, keys after each chunk of
  queries are not multiplied.

  Args:
    q_BTNH: Queries.
    k_BSKH: Keys.
    v_BSKH: Values.
    mask_BTS: True where query t may attend to key s.
    scale: Factor on the logits.
    softcap: As in `reference.attention`.
    causal: Whether `mask_BTS` hides every key after its query. Requires T = S.

  Returns:
    As `reference.attention`.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  # A key head and its G query heads form one batch entry, whose queries are stacked to G * T rows.
  heads_first = lambda x, *shape: x.swapaxes(1, 2).reshape(*shape)
  how = _Form(scale, softcap, _num_chunks(T, causal))
  q = heads_first(q_BTNH, B * K, N // K, T, H)
  k, v = (heads_first(x, B * K, x.shape[1], x.shape[3]) for x in (k_BSKH, v_BSKH))
  bias = jnp.where(mask_BTS, 0.0, MASKED)
  out = _chunked(q, k, v, bias, how)
  return out.reshape(B, N, T, -1).swapaxes(1, 2)


def _num_chunks(T: int, causal: bool) -> int:
  return min(T // _CHUNK, _MAX_CHUNKS) if causal and T % _CHUNK == 0 else 1


def computed_share(T: int, causal: bool) -> float:
  """Share of the pairs of a query and a key that are multiplied, for rows of T tokens."""
  return (1 + 1 / _num_chunks(T, causal)) / 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, how: _Form) -> jax.Array:
  """q [B*K, G, T, H], k and v [B*K, S, H], bias [B, T, S] -> [B*K, G, T, H]."""
  return _chunked_fwd(q, k, v, bias, how)[0]


def _bounds(T: int, S: int, chunks: int) -> list[tuple[int, int, int]]:
  """(first query, end of its queries, end of its keys) of each chunk."""
  size = T // chunks
  return [(i * size, (i + 1) * size, S if chunks == 1 else (i + 1) * size) for i in range(chunks)]


def _fold(x: jax.Array) -> jax.Array:
  """[B*K, G, T, H] -> [B*K, G*T, H]: the queries that share a key head, as rows of one matrix."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _dot(
  a: jax.Array, b: jax.Array, contract_a: int, contract_b: int, dtype: Any = None
) -> jax.Array:
  """Matmul over one axis of each operand, batched over axis 0."""
  return jax.lax.dot_general(
    a, b, (((contract_a,), (contract_b,)), ((0,), (0,))), preferred_element_type=dtype
  )


def _chunked_fwd(
  q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, how: _Form
) -> tuple[jax.Array, tuple]:
  BK, G, T, _ = q.shape
  B, S = bias.shape[0], k.shape[1]
  outs, weights, slopes = [], [], []  # slopes of the softcap's tanh, or None without one
  for a, b, s in _bounds(T, S, how.chunks):
    logits = _dot(_fold(q[:, :, a:b]) * how.scale, k[:, :s], 2, 2, jnp.float32)
    slope = None
    if how.softcap is not None:
      tanh = jnp.tanh(logits / how.softcap)
      logits, slope = how.softcap * tanh, (1 - tanh * tanh).astype(q.dtype)
    slopes.append(slope)
    logits = logits.reshape(B, BK // B, G, b - a, s) + bias[:, None, None, a:b, :s]
    top = logits.max(-1, keepdims=True)
    e = jnp.exp(logits - top)
    sees_any = top > 0.5 * MASKED
    p = e * jnp.where(sees_any, 1 / e.sum(-1, keepdims=True), 0)
    p = p.reshape(BK, G * (b - a), s).astype(q.dtype)
    weights.append(p)
    outs.append(_dot(p, v[:, :s], 2, 1).reshape(BK, G, b - a, -1))
  out = jnp.concatenate(outs, 2)
  return out, (q, k, v, bias, tuple(weights), tuple(slopes), out)


def _chunked_bwd(how: _Form, saved: tuple, dout: jax.Array) -> tuple:
  """Softmax gradient: dlogits = p * (dp - sum(dout * out)), see arXiv:2205.14135, appendix B.2."""
  q, k, v, bias, weights, slopes, out = saved
  BK, G, T, H = q.shape
  S = k.shape[1]
  delta = (dout * out).sum(-1, keepdims=True, dtype=jnp.float32)
  dq, dk, dv = [], jnp.zeros_like(k), jnp.zeros_like(v)
  for (a, b, s), p, slope in zip(_bounds(T, S, how.chunks), weights, slopes, strict=True):
    grow = lambda x, s=s: jnp.pad(x, ((0, 0), (0, S - s), (0, 0)))
    d = _fold(dout[:, :, a:b])
    dv += grow(_dot(p, d, 1, 1))
    dlogits = p * (_dot(d, v[:, :s], 2, 2, jnp.float32) - _fold(delta[:, :, a:b])) * how.scale
    dlogits = (dlogits if slope is None else dlogits * slope).astype(q.dtype)
    dq.append(_dot(dlogits, k[:, :s], 2, 1).reshape(BK, G, b - a, H))
    dk += grow(_dot(dlogits, _fold(q[:, :, a:b]), 1, 1))
  return jnp.concatenate(dq, 2), dk, dv, jnp.zeros_like(bias)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
