"""Attention: the definition, and forms of it that a backend runs faster.

B batch, T query position, S key position, N heads, K key/value heads, G = N / K, H head size.
"""

import functools

import jax
import jax.numpy as jnp

from jaxgpt.model import ops

_MASKED = -1e30  # finite, so that a row with no visible key has no NaN in its gradient


def reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, scale, softcap=None):
  """Grouped-query attention by definition: the reference for every kernel.

  Args:
    q_BTNH: queries; N is a multiple of K, query head n reads key head n // (N // K).
    k_BSKH, v_BSKH: keys and values; the values' H may be another than the keys'.
    mask_BTS: True where query t may read key s. A row with no True yields zeros.
    scale: factor on the logits, 1/sqrt(H) in most families.
    softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118), or None.

  Returns:
    out_BTNH in q's dtype; the softmax runs in float32.

  Raises:
    ValueError: N is no multiple of K.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  if N % K:
    raise ValueError(f"{N} query heads are no multiple of {K} key/value heads")
  q = q_BTNH.reshape(B, T, K, N // K, H)
  logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k_BSKH, preferred_element_type=jnp.float32)
  logits = ops.softcap(logits * scale, softcap)
  mask = mask_BTS[:, None, None]
  weights = jax.nn.softmax(jnp.where(mask, logits, _MASKED), axis=-1)
  weights = jnp.where(mask, weights, 0).astype(q.dtype)
  return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, -1)


# Smaller chunks of queries leave less of the upper triangle, but make smaller matmuls.
_CHUNK = 128
_MOST_CHUNKS = 8  # each is compiled on its own


def batched(q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, scale, softcap=None, causal=False):
  """Grouped-query attention in the form that XLA's CPU backend runs fastest.

  Heads become a batch dimension of plain matmuls, the softmax's gradient is written out, and where
  the mask is causal the keys after each chunk of queries are never multiplied.

  Args:
    q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale, softcap: as in `reference`, which does the work where
      there is a softcap.
    causal: whether `mask_BTS` hides every key after its query (and T = S).

  Returns:
    As `reference`.
  """
  if softcap is not None:
    return reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, softcap=softcap)
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  heads_first = lambda x, *shape: x.swapaxes(1, 2).reshape(*shape)
  chunks = min(T // _CHUNK, _MOST_CHUNKS) if causal and T % _CHUNK == 0 else 1
  chunks = chunks if T % chunks == 0 else 1
  q = heads_first(q_BTNH, B * K, N // K, T, H)
  k, v = (heads_first(x, B * K, x.shape[1], x.shape[3]) for x in (k_BSKH, v_BSKH))
  bias = jnp.where(mask_BTS, 0.0, _MASKED)
  out = _chunked(q, k, v, bias, scale, chunks)
  return out.reshape(B, N, T, -1).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(q, k, v, bias, scale, chunks):
  """q [B*K, G, T, H], k and v [B*K, S, H], bias [B, T, S] -> [B*K, G, T, H]."""
  return _chunked_fwd(q, k, v, bias, scale, chunks)[0]


def _bounds(T, S, chunks):
  """(first query, last query, last key) of each chunk."""
  size = T // chunks
  return [(i * size, (i + 1) * size, S if chunks == 1 else (i + 1) * size) for i in range(chunks)]


def _fold(x):
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _dot(a, b, contract_a, contract_b, dtype=None):
  return jax.lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((0,), (0,))),
                             preferred_element_type=dtype)


def _chunked_fwd(q, k, v, bias, scale, chunks):
  BK, G, T, _ = q.shape
  B, S = bias.shape[0], k.shape[1]
  outs, weights = [], []
  for a, b, s in _bounds(T, S, chunks):
    logits = _dot(_fold(q[:, :, a:b]) * scale, k[:, :s], 2, 2, jnp.float32)
    logits = logits.reshape(B, BK // B, G, b - a, s) + bias[:, None, None, a:b, :s]
    top = logits.max(-1, keepdims=True)
    e = jnp.exp(logits - top)
    sees_any = top > 0.5 * _MASKED
    p = e * jnp.where(sees_any, 1 / e.sum(-1, keepdims=True), 0)
    p = p.reshape(BK, G * (b - a), s).astype(q.dtype)
    weights.append(p)
    outs.append(_dot(p, v[:, :s], 2, 1).reshape(BK, G, b - a, -1))
  out = jnp.concatenate(outs, 2)
  return out, (q, k, v, bias, tuple(weights), out)


def _chunked_bwd(scale, chunks, saved, dout):
  q, k, v, bias, weights, out = saved
  BK, G, T, H = q.shape
  S = k.shape[1]
  delta = (dout * out).sum(-1, keepdims=True, dtype=jnp.float32)
  dq, dk, dv = [], jnp.zeros_like(k), jnp.zeros_like(v)
  for (a, b, s), p in zip(_bounds(T, S, chunks), weights, strict=True):
    grow = lambda x, s=s: jnp.pad(x, ((0, 0), (0, S - s), (0, 0)))
    d = _fold(dout[:, :, a:b])
    dv += grow(_dot(p, d, 1, 1))
    dlogits = p * (_dot(d, v[:, :s], 2, 2, jnp.float32) - _fold(delta[:, :, a:b])) * scale
    dlogits = dlogits.astype(q.dtype)
    dq.append(_dot(dlogits, k[:, :s], 2, 1).reshape(BK, G, b - a, H))
    dk += grow(_dot(dlogits, _fold(q[:, :, a:b]), 1, 1))
  return jnp.concatenate(dq, 2), dk, dv, jnp.zeros_like(bias)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _reference(*args, causal, **kwargs):
  del causal  # the mask says it
  return reference(*args, **kwargs)


FORMS = {"reference": _reference, "batched": batched}


def attend(form, q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, scale, softcap=None, causal=False):
  """Attention by the named form; 'auto' takes the one that the default backend runs best.

  Args:
    form: a key of `FORMS`, or 'auto'.
    causal: whether `mask_BTS` hides every key after its query (and T = S).

  The other arguments and the result are those of `reference`.
  """
  if form == "auto":
    form = "batched" if jax.default_backend() == "cpu" else "reference"
  return FORMS[form](q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, softcap=softcap, causal=causal)
