"""Attention of a block of queries to a block of keys: a part of the output, and what joins parts.

Rows that are cut over devices meet in such blocks (`ring`, `neighbours`). A forward pass gives the output over
these keys alone and the log of the softmax's normaliser; with the log over all keys, the backward
pass gives the block's share of the gradients.

B batch, N heads, K key/value heads, T query, S key, H head size.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from jaxgpt.model import ops
from jaxgpt.parallel import chips

NOTHING = -1e30  # log of a normaliser that sums nothing; finite, so that differences are numbers
ABSENT = -1  # segment of keys that are not there
LANES = chips.LANES  # a head has to fill them


class Kernel(NamedTuple):
  """What computes a block.

  Attributes:
    form: 'plain' or 'splash'.
    softcap: on the logits, or None.
    interpret: splash: runs the kernel's definition on any backend, slowly.
  """

  form: str
  softcap: float | None = None
  interpret: bool = False

  @property
  def unit(self):
    """Blocks have a multiple of so many tokens."""
    return LANES if self.form == "splash" else 1


class Band(NamedTuple):
  """Query t reads key s where 0 <= d if `causal`, and |d| < `window`, with d = offset + t - s.

  Attributes:
    causal, window: see `ops.visible`.
    offset: place of the first query less that of the first key.
  """

  causal: bool = False
  window: int | None = None
  offset: int = 0

  def hides(self, T, S):
    """Whether some of T queries may not read some of S keys."""
    least, most = self.offset - S + 1, self.offset + T - 1
    return (self.causal and least < 0) or (
      self.window is not None and max(most, -least) >= self.window
    )

  def array(self, T, S):
    """[T, S] bool."""
    distance = self.offset + jnp.arange(T)[:, None] - jnp.arange(S)
    mask = distance >= 0 if self.causal else jnp.ones((T, S), bool)
    return mask if self.window is None else mask & (jnp.abs(distance) < self.window)


def forward(kernel, band, q, k, v, q_ids, k_ids):
  """The output over one block of keys.

  Args:
    kernel, band: a `Kernel` and a `Band`.
    q, k, v: [B, N, T, H] and [B, K, S, H]; queries have their scale already.
    q_ids, k_ids: [B, 1, T] and [B, 1, S] segments; tokens read their own. 0 is padding, which
      'plain' reads nowhere; keys of `ABSENT` are read by nobody.

  Returns:
    (out [B, N, T, H] in q's dtype, log_z [B, N, T] float32).
  """
  return _FORMS[kernel.form][0](kernel, band, q, k, v, q_ids, k_ids)


def backward(kernel, band, q, k, v, q_ids, k_ids, out, log_z, dout):
  """The block's share of the gradients.

  Args:
    kernel, band, q, k, v, q_ids, k_ids: as in `forward`.
    out, log_z: of all keys, not of this block's alone.
    dout: gradient of `out`.

  Returns:
    (dq, dk, dv) in the dtypes of q, k, v.
  """
  return _FORMS[kernel.form][1](kernel, band, q, k, v, q_ids, k_ids, out, log_z, dout)


def join(part, other):
  """The output over two sets of keys, of the (out, log_z) over each; float32."""
  (a, log_a), (b, log_b) = part, other
  log_z = jnp.logaddexp(log_a, log_b)
  share = lambda x, log_x: x.astype(jnp.float32) * jnp.exp(log_x - log_z)[..., None]
  return share(a, log_a) + share(b, log_b), log_z


def _grouped(q, k):
  return q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])


def _logits(kernel, band, q, k, q_ids, k_ids):
  """(logits before and after the cap, mask), [B, K, G, T, S] float32."""
  raw = jnp.einsum("BKGTH,BKSH->BKGTS", _grouped(q, k), k, preferred_element_type=jnp.float32)
  mask = band.array(q.shape[2], k.shape[2]) & (q_ids[..., None] == k_ids[..., None, :])
  return raw, ops.softcap(raw, kernel.softcap), (mask & (k_ids[..., None, :] > 0))[:, None]


def _plain_forward(kernel, band, q, k, v, q_ids, k_ids):
  _, logits, mask = _logits(kernel, band, q, k, q_ids, k_ids)
  top = jnp.where(mask, logits, NOTHING).max(-1, keepdims=True)
  e = jnp.where(mask, jnp.exp(logits - top), 0)
  z = e.sum(-1, keepdims=True)
  out = jnp.einsum("BKGTS,BKSH->BKGTH", (e / jnp.where(z == 0, 1, z)).astype(q.dtype), v)
  log_z = jnp.where(z == 0, NOTHING, jnp.log(jnp.where(z == 0, 1, z)) + top)
  return out.reshape(*q.shape[:3], -1), log_z.reshape(q.shape[:3])


def _plain_backward(kernel, band, q, k, v, q_ids, k_ids, out, log_z, dout):
  raw, logits, mask = _logits(kernel, band, q, k, q_ids, k_ids)
  weights = jnp.where(mask, jnp.exp(logits - _grouped(log_z, k)[..., None]), 0)
  d = _grouped(dout, k)
  delta = (dout.astype(jnp.float32) * out).sum(-1)
  dlogits = jnp.einsum("BKGTH,BKSH->BKGTS", d, v, preferred_element_type=jnp.float32)
  dlogits = weights * (dlogits - _grouped(delta, k)[..., None])
  if kernel.softcap is not None:
    dlogits *= 1 - jnp.square(jnp.tanh(raw / kernel.softcap))
  weights, dlogits = weights.astype(q.dtype), dlogits.astype(q.dtype)
  return (
    jnp.einsum("BKGTS,BKSH->BKGTH", dlogits, k).reshape(q.shape),
    jnp.einsum("BKGTS,BKGTH->BKSH", dlogits, _grouped(q, k)),
    jnp.einsum("BKGTS,BKGTH->BKSH", weights, d),
  )


@functools.cache
def _mask_of(band, T, S):
  """A `Band` as splash attention's kernel takes it."""
  if not band.hides(T, S):
    return splash_mask.FullMask((T, S))
  if band.window is None:
    return splash_mask.CausalMask((T, S), band.offset)
  reach = (band.window - 1, 0 if band.causal else band.window - 1)
  return splash_mask.LocalMask((T, S), reach, band.offset)


def splash_of(band, N, T, S, kernel, name=None, head_shards=1):
  """Splash attention's kernel for N heads, T queries and S keys.

  Args:
    name: of its results, for remat policies.
    head_shards: parts that the heads are cut into outside.
  """
  block = chips.attention_block()
  q, kv = math.gcd(T, block), math.gcd(S, block)
  sizes = splash_kernel.BlockSizes(
    block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv
  )
  mask = splash_mask.MultiHeadMask([_mask_of(band, T, S)] * N)
  return splash_kernel.make_splash_mha(
    mask,
    block_sizes=sizes,
    head_shards=head_shards,
    q_seq_shards=1,
    attn_logits_soft_cap=kernel.softcap,
    interpret=kernel.interpret,
    residual_checkpoint_name=name,
  )


def padded(*heads):
  """Arrays [..., H] with zeros up to a head that fills a TPU's registers."""
  return tuple(jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)]) for x in heads)


# JAX has the two passes only as one differentiable function, whose backward pass reads the block's
# own normaliser; these are its parts.
def _splash_forward(kernel, band, q, k, v, q_ids, k_ids):
  made = splash_of(band, q.shape[1], q.shape[2], k.shape[2], kernel)

  def one(q, k, v, q_ids, k_ids):
    ids = splash_kernel.SegmentIds(q=q_ids[0], kv=k_ids[0])
    out, (log_z,) = splash_kernel._splash_attention_forward(
      made.fwd_mask_info, q, k, v, ids, None, **made.kwargs | {"save_residuals": True}
    )
    return out, log_z

  out, log_z = jax.vmap(one)(*padded(q, k, v), q_ids, k_ids)
  return out[..., : v.shape[-1]], log_z


def _splash_backward(kernel, band, q, k, v, q_ids, k_ids, out, log_z, dout):
  made = splash_of(band, q.shape[1], q.shape[2], k.shape[2], kernel)
  fields = made.kwargs | {"save_residuals": False}

  def one(q, k, v, q_ids, k_ids, out, log_z, dout):
    ids = splash_kernel.SegmentIds(q=q_ids[0], kv=k_ids[0])
    saved = (q, k, v, ids, None, out, log_z, made.dq_mask_info, made.dkv_mask_info)
    return splash_kernel._splash_attention_bwd(res=saved, do=dout, **fields)[3:6]

  out, dout = padded(out.astype(q.dtype), dout)
  grads = jax.vmap(one)(*padded(q, k, v), q_ids, k_ids, out, log_z, dout)
  return tuple(d[..., : x.shape[-1]] for d, x in zip(grads, (q, k, v), strict=True))


_FORMS = {"plain": (_plain_forward, _plain_backward), "splash": (_splash_forward, _splash_backward)}
