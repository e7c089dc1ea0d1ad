"""Attention over a paged cache: keys and values in blocks, which rows hold in any order.

A block holds S consecutive tokens of one row. Blocks lie in a pool, and a row's table names its
blocks, so that rows of different lengths share the pool and rows with the same beginning share
blocks. A call is one of two kinds:

  Chunk   blocks of prompts, of one or of several rows
  Step    the next token of each row of a batch, or a few of them

The cost follows the number of blocks that the rows of a call hold. Neither the pool's size nor the
longest context enters. A loop runs over blocks, and its number of turns is not known to the
compiler, so one program serves all lengths:

  blocks of the rows    row 0: a b c    row 1: d    row 2: e f
  pairs                 a b c d | e f . .           4 in a turn
  in a turn             logits, softmax and sum of values of each pair's block
  after the loop        each row merges the results of its pairs, in their order

A row's result does not depend on the other rows, to the last bit: a pair is computed in a shape
that does not change, and what a row merges for the pairs it lacks is zero.

On TPUs a kernel computes the next token of each row where it can (`kernels.paged`).

M block of the pool, S slot of a block, B row, T query, N heads, K key/value heads, G = N / K, H
head size, J block of a row, P pair of a row and a block, W pair of a turn, Q query head of a token,
C block of a chunk.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.model import kv_cache, ops
from jaxgpt.model.attention.kernels import paged as paged_kernel
from jaxgpt.model.attention.masks import MASKED
from jaxgpt.model.attention.spec import Spec
from jaxgpt.model.kv_cache import Pool

Array = jax.Array | np.ndarray


class Pairs(NamedTuple):
  """The blocks that the rows of a step read.

  Attributes:
    rows: int32 [P], the row of each pair.
    blocks: int32 [P], its block of the pool.
    starts: int32 [P], position of the block's first token.
    table: int32 [B, J], the pairs of each row in the order of their positions, P where there is
      none.
    num: int32 scalar, number of pairs. What follows them is not read.
  """

  rows: Array
  blocks: Array
  starts: Array
  table: Array
  num: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
  """A call for T consecutive tokens of each row: one, and those that a draft adds.

  Attributes:
    blocks: int32 [B, T], the block of each token.
    offsets: int32 [B, T], its slot in the block.
    pairs: {kind of attention: the blocks that they read}, their own among them.
    context: Longest context of a row, in tokens.
    turn: W, pairs that a turn of the loop computes. It divides P.
  """

  blocks: Array
  offsets: Array
  pairs: dict[str, Pairs]
  context: int = dataclasses.field(metadata=dict(static=True))
  turn: int = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
  """A call for C blocks of S tokens each, of any rows: T = C * S in one row of the model's batch.

  A later block of a row attends to an earlier one of the same call.

  Attributes:
    tables: int32 [C, J], the table of the row of each block.
    numbers: int32 [C], index into the table of the block itself.
    context: Longest context of a row, in tokens.
  """

  tables: Array
  numbers: Array
  context: int = dataclasses.field(metadata=dict(static=True))


Call = Step | Chunk


def write(pool: Pool, new_BTKH: jax.Array, call: Call) -> Pool:
  """Writes a call's tokens into the pool, with scales if it has them.

  Args:
    pool: The pool of a layer.
    new_BTKH: Keys, values or latents of the tokens. B = 1 in a chunk.
    call: Where they go.
  """
  if pool.scales is None:
    return Pool(_written(pool.entries, new_BTKH.astype(pool.entries.dtype), call))
  entries, scales = kv_cache.quantized(new_BTKH)
  return Pool(_written(pool.entries, entries, call), _written(pool.scales, scales, call))


def _written(x: jax.Array, new: jax.Array, call: Call) -> jax.Array:
  """Entries [K, M, S, H] or scales [K, M, S] with new ones [B, T, K, H] or [B, T, K]."""
  new = jnp.moveaxis(new, 2, 0)
  if isinstance(call, Step):
    return x.at[:, call.blocks, call.offsets].set(new)
  K, _, S, *H = x.shape
  blocks = jnp.take_along_axis(call.tables, call.numbers[:, None], axis=1)[:, 0]
  return x.at[:, blocks].set(new.reshape(K, -1, S, *H))


def attend(
  q_BTNH: jax.Array,
  k: Pool,
  v: Pool | None,
  call: Call,
  kind: str,
  positions_BT: jax.Array,
  spec: Spec,
  *,
  v_size: int | None = None,
  with_kernel: bool = False,
) -> jax.Array:
  """Attends to the tokens of each query's own row up to the query's position.

  Args:
    q_BTNH: Queries. Query head n reads key head n // (N // K).
    k: The pool of keys, with the call's own.
    v: The pool of values. None: the first `v_size` entries of the keys.
    call: The blocks of the rows.
    kind: The kind of attention, a key of `Step.pairs`.
    positions_BT: Positions of the queries.
    spec: Options. `causal` is not read.
    v_size: See `v`.
    with_kernel: Whether a step may use the kernel for TPUs.

  Returns:
    [B, T, N, size of the values] in q's dtype. The softmax is computed in float32.
  """
  pools = _Pools(k, v, v_size)
  if isinstance(call, Step):
    pairs = call.pairs[kind]
    # Entries beyond a row's pairs name the spare block, with which the pairs end.
    if with_kernel and v is not None and paged_kernel.supports(q_BTNH, k, v, pairs.table, spec):
      tables_BJ = jnp.asarray(pairs.blocks)[jnp.minimum(pairs.table, len(pairs.blocks) - 1)]
      return paged_kernel.attend(q_BTNH, k, v, tables_BJ, positions_BT, spec)
    return _step(q_BTNH, pools, pairs, positions_BT, spec, call.turn)
  return _chunk(q_BTNH, pools, call, positions_BT[0], spec)


class _Pools(NamedTuple):
  """Keys and values of a layer."""

  k: Pool
  v: Pool | None
  v_size: int | None

  def read(self, blocks: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Keys and values [K, blocks, S, H], without their scales."""
    k = self.k.entries[:, blocks].astype(dtype)
    if self.v is None:
      return k, k[..., : self.v_size]
    return k, self.v.entries[:, blocks].astype(dtype)

  def key_scaled(self, products: jax.Array, blocks: jax.Array) -> jax.Array:
    """Products with keys of some blocks, times the keys' scales."""
    return _scaled(products, self.k.scales, blocks)

  def value_scaled(self, weights: jax.Array, blocks: jax.Array) -> jax.Array:
    """Weights of values of some blocks, times the values' scales."""
    return _scaled(weights, (self.v or self.k).scales, blocks)

  @property
  def size(self) -> int:
    """Size of a value."""
    return self.v.entries.shape[-1] if self.v is not None else self.v_size or 0


def _scaled(x: jax.Array, scales_KMS: jax.Array | None, blocks: jax.Array) -> jax.Array:
  """x [K, blocks, any, S], times the scales of some blocks if there are any."""
  if scales_KMS is None:
    return x
  scales = scales_KMS[:, blocks]
  inner = (1,) * (x.ndim - scales.ndim)
  return x * scales.reshape(*scales.shape[:-1], *inner, scales.shape[-1])


def _visible(q_at: jax.Array, k_at: jax.Array, window: int | None) -> jax.Array:
  """Whether queries at some positions see keys at others."""
  distance = q_at - k_at
  return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _step(
  q_BTNH: jax.Array, pools: _Pools, pairs: Pairs, positions_BT: jax.Array, spec: Spec, W: int
) -> jax.Array:
  """Attention of a token of each row, or of a few. See the drawing above.

  Q is T * G: the queries of a row that read the same keys.
  """
  B, T, N, H = q_BTNH.shape
  K, _, S, _ = pools.k.entries.shape
  G, P = N // K, len(pairs.rows)
  q_KBQH = jnp.moveaxis(q_BTNH.reshape(B, T, K, G, H), 2, 0).reshape(K, B, T * G, H)
  position_BQ = jnp.repeat(positions_BT, G, axis=1)

  def turn(i, carry):
    at = i * W
    rows, blocks, starts = (
      jax.lax.dynamic_slice_in_dim(x, at, W) for x in (pairs.rows, pairs.blocks, pairs.starts)
    )
    k, v = pools.read(blocks, q_BTNH.dtype)
    logits = jnp.einsum("KWQH,KWSH->KWQS", q_KBQH[:, rows], k, preferred_element_type=jnp.float32)
    logits = ops.softcap(pools.key_scaled(logits * spec.scale, blocks), spec.softcap)
    at_WS = starts[:, None] + jnp.arange(S)
    seen = _visible(position_BQ[rows][..., None], at_WS[:, None], spec.window)
    logits = jnp.where(seen, logits, MASKED)
    most = logits.max(-1)
    weights = jnp.where(seen, jnp.exp(logits - most[..., None]), 0)
    out = jnp.einsum(
      "KWQS,KWSH->KWQH",
      pools.value_scaled(weights, blocks).astype(v.dtype),
      v,
      preferred_element_type=jnp.float32,
    )
    put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, at, 1)
    return tuple(map(put, carry, (most, weights.sum(-1), out)))

  # One entry more stays as it is, for rows that have fewer pairs than others.
  start = (
    jnp.full((K, P + 1, T * G), MASKED, jnp.float32),
    jnp.zeros((K, P + 1, T * G), jnp.float32),
    jnp.zeros((K, P + 1, T * G, pools.size), jnp.float32),
  )
  turns = (pairs.num + W - 1) // W
  found = jax.lax.fori_loop(0, turns, turn, start)
  most_KBJ, sums_KBJ, out_KBJ = (x[:, pairs.table] for x in found)
  share_KBJ = jnp.exp(most_KBJ - most_KBJ.max(2, keepdims=True))
  total = (share_KBJ * sums_KBJ).sum(2)
  out = (share_KBJ[..., None] * out_KBJ).sum(2) / jnp.maximum(total, 1e-30)[..., None]
  out_BTNH = jnp.moveaxis(out.reshape(K, B, T, G, -1), 0, 2).reshape(B, T, N, -1)
  return out_BTNH.astype(q_BTNH.dtype)


def pairs_per_turn(num_rows: int, platform: str) -> int:
  """W, the pairs that one turn of a step's loop computes on a platform, such as 'cpu'.

  A turn costs some ten microseconds on accelerators, however little it computes, so that the cost
  of a step there follows the cache in units of 64 blocks.
  """
  return max(num_rows, 2 if platform == "cpu" else 64)


def _chunk(
  q_BTNH: jax.Array, pools: _Pools, call: Chunk, positions_T: jax.Array, spec: Spec
) -> jax.Array:
  """Attention of blocks of queries, a block of keys for each in each turn of the loop.

  Blocks of rows that need fewer turns than others see nothing in the last ones.
  """
  _, T, N, H = q_BTNH.shape
  K, _, S, _ = pools.k.entries.shape
  C, G = len(call.numbers), N // K
  q_KCGTH = q_BTNH[0].reshape(C, S, K, G, H).transpose(2, 0, 3, 1, 4)
  positions_CT = positions_T.reshape(C, S)

  def turn(j, carry):
    most, total, out = carry
    blocks = jnp.asarray(call.tables)[:, j]
    k, v = pools.read(blocks, q_BTNH.dtype)
    logits = jnp.einsum("KCGTH,KCSH->KCGTS", q_KCGTH, k, preferred_element_type=jnp.float32)
    logits = ops.softcap(pools.key_scaled(logits * spec.scale, blocks), spec.softcap)
    seen = _visible(positions_CT[..., None], j * S + jnp.arange(S), spec.window)[:, None]
    logits = jnp.where(seen, logits, MASKED)
    now = jnp.maximum(most, logits.max(-1))
    weights = jnp.where(seen, jnp.exp(logits - now[..., None]), 0)
    fade = jnp.exp(most - now)
    part = jnp.einsum(
      "KCGTS,KCSH->KCGTH",
      pools.value_scaled(weights, blocks).astype(v.dtype),
      v,
      preferred_element_type=jnp.float32,
    )
    return now, fade * total + weights.sum(-1), fade[..., None] * out + part

  first = jnp.int32(0)
  if spec.window is not None:
    first = jnp.maximum(positions_T.min() - spec.window + 1, 0) // S
  start = (
    jnp.full((K, C, G, S), MASKED, jnp.float32),
    jnp.zeros((K, C, G, S), jnp.float32),
    jnp.zeros((K, C, G, S, pools.size), jnp.float32),
  )
  _, total, out = jax.lax.fori_loop(first, call.numbers.max() + 1, turn, start)
  out = out / jnp.maximum(total, 1e-30)[..., None]
  return out.transpose(1, 3, 0, 2, 4).reshape(1, T, N, -1).astype(q_BTNH.dtype)
