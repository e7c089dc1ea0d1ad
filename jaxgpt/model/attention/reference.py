"""Attention by definition: the reference that every other implementation is tested against.

B batch, T query position, S key position, N heads, K key/value heads, G = N / K, H head size.
"""

import jax
import jax.numpy as jnp

from jaxgpt.model import ops
from jaxgpt.model.attention.masks import MASKED


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask_BTS: jax.Array,
  *,
  scale: float,
  softcap: float | None = None,
) -> jax.Array:
  """Computes grouped-query attention by definition; the reference for every kernel.

  Args:
    q_BTNH: Queries. N must be a multiple of K. Query head n reads key head n // (N // K).
    k_BSKH: Keys.
    v_BSKH: Values. Their H may differ from that of the keys.
    mask_BTS: True where query t may attend to key s. A row without True yields zeros.
    scale: Factor on the logits, 1/sqrt(H) in most families.
    softcap: If given, logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118).

  Returns:
    Array of shape BTNH in q's dtype. The softmax is computed in float32.

  Raises:
    ValueError: N is not a multiple of K.
  """
  return weighted(pattern(q_BTNH, k_BSKH, mask_BTS, scale=scale, softcap=softcap), v_BSKH)


def pattern(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  mask_BTS: jax.Array,
  *,
  scale: float,
  softcap: float | None = None,
) -> jax.Array:
  """Computes the attention pattern: how much query t reads of key s.

  Args:
    q_BTNH: Queries.
    k_BSKH: Keys.
    mask_BTS: True where query t may attend to key s. A row without True yields zeros.
    scale: Factor on the logits.
    softcap: As in `attention`.

  Returns:
    Array of shape BKGTS in q's dtype, whose rows over s sum to 1. Head n is (k, g) with
    n = k * G + g.

  Raises:
    ValueError: N is not a multiple of K.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  if N % K:
    raise ValueError(f"{N} query heads are not a multiple of {K} key/value heads")
  q = q_BTNH.reshape(B, T, K, N // K, H)
  logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k_BSKH, preferred_element_type=jnp.float32)
  logits = ops.softcap(logits * scale, softcap)
  mask = mask_BTS[:, None, None]
  weights = jax.nn.softmax(jnp.where(mask, logits, MASKED), axis=-1)
  # Where no key is visible the softmax is uniform, not zero.
  return jnp.where(mask, weights, 0).astype(q.dtype)


def weighted(pattern_BKGTS: jax.Array, v_BSKH: jax.Array) -> jax.Array:
  """The sums of values, weighted by an attention pattern: [B, T, N, H]."""
  B, _, _, T, _ = pattern_BKGTS.shape
  out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", pattern_BKGTS, v_BSKH)
  return out_BTKGH.reshape(B, T, -1, v_BSKH.shape[-1])
