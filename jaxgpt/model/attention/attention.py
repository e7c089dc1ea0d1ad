"""Attention of a layer: calls the chosen implementation.

  mask given                     mask not needed
  -----------------------------  ------------------------------------------------------
  `reference`  by definition     `splash`            whole rows on TPUs
  `batched`    for CPUs          `context_parallel`  rows sharded over devices: `ring`,
  `cudnn`      for GPUs                              `halo`, or gathered keys for cuDNN

`choose` turns model.attention into one of these implementations.

B batch, T query position, S key position, N heads, K key/value heads, H head size.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.config.remat import ATTENTION
from jaxgpt.model.attention import batched, context_parallel, reference, token_order
from jaxgpt.model.attention.kernels import cudnn, splash
from jaxgpt.model.attention.spec import Spec


def needs_mask(form: str, length: int) -> bool:
  """Whether an implementation reads the mask as an array [B, T, S], for rows of `length` tokens.

  The others build it block by block, from segment ids and the options. Rows that are not a multiple
  of splash's smallest block need it too: `attend` computes them by definition. Training has no such
  rows, but predictions and scores pad theirs to the next of a few lengths.
  """
  if token_order.num_shards(length) > 1:
    return False
  return form != "splash" or length % splash.LANES != 0


def prepared(
  form: str, qkv: tuple[jax.Array, ...], spec: Spec
) -> tuple[tuple[jax.Array, ...], Spec]:
  """Queries, keys and values as the kernels of a form read them: scaled and padded for 'splash'.

  Done before remat policies save them. After that, the backward pass would do it again.

  Args:
    form: One of `choose.FORMS`.
    qkv: Queries [B, T, N, H], keys and values [B, T, K, H].
    spec: Options.

  Returns:
    (qkv, spec) for `attend`. Its result has the padding of the values.
  """
  q, k, v = qkv
  if form != "splash" or needs_mask(form, q.shape[1]):
    return qkv, spec
  qkv = q * spec.scale, k, v
  whole = token_order.num_shards(q.shape[1]) == 1  # sharded rows would send the padding around
  return splash.padded(*qkv) if whole else qkv, spec._replace(scale=1.0)


def attend(
  form: str,
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask_BTS: jax.Array | None,
  segment_ids_BT: jax.Array | None,
  spec: Spec,
) -> jax.Array:
  """Computes attention with the given implementation.

  The result has the checkpoint name `ATTENTION` for remat policies.

  Args:
    form: One of `choose.FORMS`.
    q_BTNH: Queries.
    k_BSKH: Keys.
    v_BSKH: Values.
    mask_BTS: True where query t may attend to key s, None where `needs_mask` is False.
    segment_ids_BT: Segments of the tokens, read where there is no mask.
    spec: Options. If `spec.causal`, the mask hides every key after its query and T = S. Rows that
      the mesh shards are then in the order of `token_order.balance`.

  Returns:
    As `reference.attention`.
  """
  if mask_BTS is None:
    assert segment_ids_BT is not None
    if token_order.num_shards(q_BTNH.shape[1]) > 1:
      return context_parallel.attention(form, q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, spec)
    return splash.attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, spec)
  if form == "cudnn":
    out = cudnn.attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, spec)
  elif form == "batched":
    out = batched.attention(
      q_BTNH,
      k_BSKH,
      v_BSKH,
      mask_BTS,
      scale=spec.scale,
      softcap=spec.softcap,
      causal=spec.causal,
    )
  else:
    out = reference.attention(
      q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=spec.scale, softcap=spec.softcap
    )
  return checkpoint_name(out, ATTENTION)
