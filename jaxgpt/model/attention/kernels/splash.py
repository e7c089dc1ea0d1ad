"""Splash attention: the Pallas flash attention kernel for TPUs, which skips masked blocks.

B batch, T query position, S key position, N heads, K key/value heads, H head size.
"""

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.config.remat import ATTENTION
from jaxgpt.model.attention.blocks import choose, grid
from jaxgpt.model.attention.blocks.grid import Call
from jaxgpt.model.attention.kernels.added_parts import adding
from jaxgpt.model.attention.masks import Band
from jaxgpt.model.attention.spec import Block, BlockOutput, Spec
from jaxgpt.parallel import chips

LANES = chips.LANES  # heads are padded to it, and it is the smallest block in tokens


def attention(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array, spec: Spec
) -> jax.Array:
  """Computes attention within whole rows.

  Under a mesh each device computes its own rows and heads. `context_parallel.attention` handles
  rows that are sharded.

  Args:
    q_BTNH: Queries.
    k_BSKH: Keys, with S = T.
    v_BSKH: Values.
    segment_ids_BT: 1, 2, ... for the documents of a row, 0 for padding, which attends to padding.
    spec: Scale, softcap and mask.

  Returns:
    As `reference.attention`, except at padding.
  """
  B, T, N = q_BTNH.shape[:3]
  mesh = jax.sharding.get_abstract_mesh()
  of = lambda axis: 1 if mesh.empty else spec.rules.num_shards(mesh, axis)
  shards = of("act_heads")
  # The kernel has no factor on the logits and wants heads first.
  q, k, v = padded(*(x.swapaxes(1, 2) for x in (q_BTNH * spec.scale, k_BSKH, v_BSKH)))
  band = Band(spec.causal, spec.window)
  call = Call(
    max(B // of("batch"), 1), N // shards, max(k.shape[1] // shards, 1), T, T, q.shape[-1], band
  )
  n = grid.spread(call, chips.of_tracing())
  kernel = make_kernel(call, spec, name=ATTENTION, head_shards=shards)

  # One call per row: the kernel has no batch axis.
  def local(kernel, q, k, v, ids_BT):
    one = functools.partial(_attend, kernel)
    rows = [_spread(x, n) for x in (q, k, v)] + [jnp.repeat(ids_BT, n, 0)]
    with jax.named_scope(band.label(T, T)):  # plans count the blocks that the mask leaves
      return jax.vmap(one)(*rows).reshape(*q.shape[:3], -1)

  if not mesh.empty and mesh.size > 1:
    batch, heads = spec.rules.spec(("batch", "act_heads"))
    of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, P(heads, None)))
    whole = P(batch, heads)
    local = jax.shard_map(
      local, in_specs=(of_kernel, whole, whole, whole, P(batch)), out_specs=whole, check_vma=False
    )
  out = local(kernel, q, k, v, segment_ids_BT)
  return out[..., : v_BSKH.shape[-1]].swapaxes(1, 2).astype(q_BTNH.dtype)


def _of_row(
  kernel: splash_kernel.SplashAttentionKernel,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  ids: jax.Array,
) -> jax.Array:
  """The kernel on a row."""
  out = kernel(q, k, v, segment_ids=splash_kernel.SegmentIds(q=ids, kv=ids))
  return cast(jax.Array, out)  # without its softmax statistics


def _attend_forward(
  kernel: splash_kernel.SplashAttentionKernel,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  ids: jax.Array,
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, ...]]]:
  return jax.vjp(lambda q, k, v: _of_row(kernel, q, k, v, ids), q, k, v)


def _attend_backward(
  backward: Callable[[jax.Array], tuple[jax.Array, ...]], dout: jax.Array
) -> tuple[jax.Array | None, ...]:
  return None, *adding(backward)(dout), None


_attend = jax.custom_vjp(_of_row)  # with the gradient of the queries added up by `added_parts`
_attend.defvjp(_attend_forward, _attend_backward)


@functools.cache
def _mask(band: Band, T: int, S: int) -> splash_mask.Mask:
  """A `Band` in the form that the kernel takes."""
  if not band.hides(T, S):
    return splash_mask.FullMask((T, S))
  if band.window is None:
    return splash_mask.CausalMask((T, S), band.offset)
  reach = (band.window - 1, 0 if band.causal else band.window - 1)
  return splash_mask.LocalMask((T, S), reach, band.offset)


def make_kernel(
  call: Call, spec: Spec, *, name: str | None = None, head_shards: int = 1
) -> splash_kernel.SplashAttentionKernel:
  """Builds the kernel for one mask.

  Args:
    call: The mask, and the shape of the call on one device, before `grid.spread`.
    spec: Softcap, and whether to interpret the kernel.
    name: Checkpoint name of the kernel's results, for remat policies.
    head_shards: Number of shards of the heads, if the kernel is called under `jax.shard_map`.
  """
  chip = chips.of_tracing()
  call = grid.spread_call(call, chip)
  blocks = choose.find(call, chip)
  return splash_kernel.make_splash_mha(
    splash_mask.MultiHeadMask([_mask(call.band, call.T, call.S)] * (call.heads * head_shards)),
    block_sizes=splash_kernel.BlockSizes(**blocks.of_kernel()),
    head_shards=head_shards,
    q_seq_shards=1,
    attn_logits_soft_cap=spec.softcap,
    interpret=spec.interpret,
    residual_checkpoint_name=name,
  )


def padded(*heads: jax.Array) -> tuple[jax.Array, ...]:
  """Pads arrays [..., H] with zeros until H is a multiple of `LANES`."""
  return tuple(jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)]) for x in heads)


def _spread(x: jax.Array, n: int) -> jax.Array:
  """[B, heads, ...] -> [B * n, heads / n, ...]: parts of the heads as rows, see `grid.spread`."""
  return x.reshape(x.shape[0] * n, x.shape[1] // n, *x.shape[2:])


def _rows(n: int, qkv: tuple[jax.Array, ...], block: Block) -> tuple[jax.Array, ...]:
  """Queries, keys, values and both segments, with `n` parts of the heads as rows."""
  ids = (jnp.repeat(x, n, 0) for x in (block.q_ids, block.k_ids))
  return (*(_spread(x, n) for x in qkv), *ids)


def _call(q_BNTH: jax.Array, k_BKSH: jax.Array, band: Band) -> Call:
  """The call of a kernel with all of these queries and keys."""
  B, N, T, H = q_BNTH.shape
  return Call(B, N, k_BKSH.shape[1], T, k_BKSH.shape[2], H, band)


# The two passes of a block, see `blockwise`. JAX publishes them only as one differentiable
# function, whose backward pass uses the softmax normalizer of its own block. A block of a longer
# row needs the normalizer of the whole row, so these functions call the kernel's private passes.


def block_forward(spec: Spec, band: Band, block: Block) -> BlockOutput:
  """Computes `blockwise.forward` with the kernel."""
  q, k, v = padded(block.q, block.k, block.v)
  call = _call(q, k, band)
  made, n = make_kernel(call, spec), grid.spread(call, chips.of_tracing())

  def one(q, k, v, q_ids, k_ids):
    ids = splash_kernel.SegmentIds(q=q_ids[0], kv=k_ids[0])
    out, (log_z,) = splash_kernel._splash_attention_forward(
      made.fwd_mask_info, q, k, v, ids, None, **made.kwargs | {"save_residuals": True}
    )
    return out, log_z

  with jax.named_scope(band.label(q.shape[2], k.shape[2])):
    out, log_z = jax.vmap(one)(*_rows(n, (q, k, v), block))
  out, log_z = out.reshape(*q.shape[:3], -1), log_z.reshape(q.shape[:3])
  return BlockOutput(out[..., : block.v.shape[-1]], log_z)


def block_backward(
  spec: Spec, band: Band, block: Block, total: BlockOutput, dout: jax.Array
) -> tuple[jax.Array, ...]:
  """Computes `blockwise.backward` with the kernel."""
  q, k, v = padded(block.q, block.k, block.v)
  call = _call(q, k, band)
  made, n = make_kernel(call, spec), grid.spread(call, chips.of_tracing())
  fields = made.kwargs | {"save_residuals": False}

  def one(q, k, v, q_ids, k_ids, out, log_z, dout):
    ids = splash_kernel.SegmentIds(q=q_ids[0], kv=k_ids[0])
    residuals = (q, k, v, ids, None, out, log_z, made.dq_mask_info, made.dkv_mask_info)
    backward = lambda dout: splash_kernel._splash_attention_bwd(res=residuals, do=dout, **fields)
    return adding(backward)(dout)[3:6]

  out, dout = padded(total.out.astype(q.dtype), dout)
  with jax.named_scope(band.label(q.shape[2], k.shape[2])):
    of_rows = (_spread(x, n) for x in (out, total.log_z, dout))
    grads = jax.vmap(one)(*_rows(n, (q, k, v), block), *of_rows)
  return tuple(
    d.reshape(*x.shape[:3], -1)[..., : x.shape[-1]] for d, x in zip(grads, block[:3], strict=True)
  )
