"""Attention: the definition, and forms of it that a backend runs faster.

B batch, T query position, S key position, N heads, K key/value heads, G = N / K, H head size.
"""

import jax
import jax.numpy as jnp

from jaxgpt.model import ops

_MASKED = -1e30  # finite, so that a row with no visible key has no NaN in its gradient


def reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, scale, softcap=None):
  """Grouped-query attention by definition: the reference for every kernel.

  Args:
    q_BTNH: queries; N is a multiple of K, query head n reads key head n // (N // K).
    k_BSKH, v_BSKH: keys and values.
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
  return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)


FORMS = {"reference": reference}


def attend(form, q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, scale, softcap=None):
  """Attention by the named form; 'auto' takes the one that the default backend runs best.

  See `reference` for the arguments and the result.
  """
  if form == "auto":
    form = "batched" if jax.default_backend() == "cpu" and "batched" in FORMS else "reference"
  return FORMS[form](q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, softcap=softcap)
