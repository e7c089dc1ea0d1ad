"""Attention of a block of queries to a block of keys, and the merge of such partial results.

Rows that are sharded over devices are computed block by block (`ring`, `halo`). Softmax attention
can be split over blocks of keys because of the online softmax (arXiv:1805.02867, as in
FlashAttention, arXiv:2205.14135). Each block i gives its own softmax output and the log of its
normalizer,

  out_i = sum_s exp(l_s) v_s / z_i     log z_i = log sum_s exp(l_s)     over the keys s of block i

and two blocks merge, in any order, into the attention to the keys of both:

  log z = log(exp(log z_1) + exp(log z_2))
  out   = out_1 exp(log z_1 - log z) + out_2 exp(log z_2 - log z)

The backward pass needs no merge: with log z of all keys, the weights exp(l_s - log z) are final,
and the gradients of the blocks add up.

B batch, N heads, K key/value heads, G = N / K, T query, S key, H head size.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.model import ops
from jaxgpt.model.attention.kernels import splash
from jaxgpt.model.attention.masks import MASKED, Band
from jaxgpt.model.attention.spec import Block, BlockOutput, ContextParallel, Spec

NO_LOG_Z = MASKED  # log of an empty sum; finite, so that differences of two of them are not NaN
NO_SEGMENT = -1  # segment of keys that do not exist


def forward(cp: ContextParallel, band: Band, block: Block) -> BlockOutput:
  """Computes attention to one block of keys.

  Args:
    cp: The implementation of the block, and the softcap.
    band: The mask.
    block: Queries and keys.

  Returns:
    The output, in q's dtype, and its normalizer.
  """
  run = splash.block_forward if cp.kernel == "splash" else _plain_forward
  return run(cp.spec, band, block)


def backward(
  cp: ContextParallel, band: Band, block: Block, total: BlockOutput, dout: jax.Array
) -> tuple[jax.Array, ...]:
  """Computes one block's share of the gradients.

  Args:
    cp: As in `forward`.
    band: As in `forward`.
    block: As in `forward`.
    total: BlockOutput and normalizer over all keys, not only those of this block.
    dout: Gradient of `total.out`.

  Returns:
    (dq, dk, dv) in the dtypes of q, k and v.
  """
  run = splash.block_backward if cp.kernel == "splash" else _plain_backward
  return run(cp.spec, band, block, total, dout)


def merge(a: BlockOutput, b: BlockOutput) -> BlockOutput:
  """Attention to two disjoint sets of keys, from the attention to each, in float32."""
  log_z = jnp.logaddexp(a.log_z, b.log_z)
  share = lambda x: x.out.astype(jnp.float32) * jnp.exp(x.log_z - log_z)[..., None]
  return BlockOutput(share(a) + share(b), log_z)


def _grouped(q: jax.Array, k: jax.Array) -> jax.Array:
  """[B, N, ...] -> [B, K, G, ...]: the query heads of each key head."""
  return q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])


def _logits(spec: Spec, band: Band, block: Block) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(logits before the softcap, logits after it, mask), [B, K, G, T, S], float32."""
  q, k, _, q_ids, k_ids = block
  raw = jnp.einsum("BKGTH,BKSH->BKGTS", _grouped(q, k), k, preferred_element_type=jnp.float32)
  mask = band.array(q.shape[2], k.shape[2]) & (q_ids[..., None] == k_ids[..., None, :])
  return raw, ops.softcap(raw, spec.softcap), (mask & (k_ids[..., None, :] > 0))[:, None]


def _plain_forward(spec: Spec, band: Band, block: Block) -> BlockOutput:
  q, v = block.q, block.v
  _, logits, mask = _logits(spec, band, block)
  # A query without any visible key gets out = 0 and an empty sum, without dividing by zero.
  top = jnp.where(mask, logits, NO_LOG_Z).max(-1, keepdims=True)
  e = jnp.where(mask, jnp.exp(logits - top), 0)
  z = e.sum(-1, keepdims=True)
  out = jnp.einsum("BKGTS,BKSH->BKGTH", (e / jnp.where(z == 0, 1, z)).astype(q.dtype), v)
  log_z = jnp.where(z == 0, NO_LOG_Z, jnp.log(jnp.where(z == 0, 1, z)) + top)
  return BlockOutput(out.reshape(*q.shape[:3], -1), log_z.reshape(q.shape[:3]))


def _plain_backward(
  spec: Spec, band: Band, block: Block, total: BlockOutput, dout: jax.Array
) -> tuple[jax.Array, ...]:
  q, k, v = block.q, block.k, block.v
  raw, logits, mask = _logits(spec, band, block)
  weights = jnp.where(mask, jnp.exp(logits - _grouped(total.log_z, k)[..., None]), 0)
  d = _grouped(dout, k)
  delta = (dout.astype(jnp.float32) * total.out).sum(-1)
  dlogits = jnp.einsum("BKGTH,BKSH->BKGTS", d, v, preferred_element_type=jnp.float32)
  dlogits = weights * (dlogits - _grouped(delta, k)[..., None])
  if spec.softcap is not None:
    dlogits *= 1 - jnp.square(jnp.tanh(raw / spec.softcap))
  weights, dlogits = weights.astype(q.dtype), dlogits.astype(q.dtype)
  return (
    jnp.einsum("BKGTS,BKSH->BKGTH", dlogits, k).reshape(q.shape),
    jnp.einsum("BKGTS,BKGTH->BKSH", dlogits, _grouped(q, k)),
    jnp.einsum("BKGTS,BKGTH->BKSH", weights, d),
  )


def in_sequence(*xs: Any) -> Any:
  """Returns its arguments behind an optimization barrier: none is used before all are computed.

  Without it a compiler may compute all blocks first and merge them later, so that the outputs of
  all blocks are in memory together.
  """
  return jax.lax.optimization_barrier(xs)
