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
  """

  blocks: Array
  offsets: Array
  pairs: dict[str, Pairs]
  context: int = dataclasses.field(metadata=dict(static=True))


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
  """Entries [M, K, S, H] or scales [M, K, S] with new ones [B, T, K, H] or [B, T, K]."""
  if isinstance(call, Step):
    return x.at[call.blocks, :, call.offsets].set(new)
  _, K, S, *H = x.shape
  filled = new.reshape(-1, S, K, *H).swapaxes(1, 2)
  blocks = jnp.take_along_axis(call.tables, call.numbers[:, None], axis=1)[:, 0]
  return x.at[blocks].set(filled)


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

  Returns:
    [B, T, N, size of the values] in q's dtype. The softmax is computed in float32.
  """
  pools = _Pools(k, v, v_size)
  if isinstance(call, Step):
    return _step(q_BTNH, pools, call.pairs[kind], positions_BT, spec)
  return _chunk(q_BTNH, pools, call, positions_BT[0], spec)


class _Pools(NamedTuple):
  """Keys and values of a layer."""

  k: Pool
  v: Pool | None
  v_size: int | None

  def read(self, blocks: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Keys and values of some blocks, without their scales."""
    k = self.k.entries[blocks].astype(dtype)
    if self.v is None:
      return k, k[..., : self.v_size]
    return k, self.v.entries[blocks].astype(dtype)

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


def _scaled(x: jax.Array, scales_MKS: jax.Array | None, blocks: jax.Array) -> jax.Array:
  """x [..., K, any, S], times the scales of some blocks [...] if there are any."""
  if scales_MKS is None:
    return x
  *outer, K, S = scales_MKS[blocks].shape
  inner = (1,) * (x.ndim - len(outer) - 2)
  return x * scales_MKS[blocks].reshape(*outer, K, *inner, S)


def _visible(q_at: jax.Array, k_at: jax.Array, window: int | None) -> jax.Array:
  """Whether queries at some positions see keys at others."""
  distance = q_at - k_at
  return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _step(
  q_BTNH: jax.Array, pools: _Pools, pairs: Pairs, positions_BT: jax.Array, spec: Spec
) -> jax.Array:
  """Attention of a token of each row, or of a few. See the drawing above.

  Q is T * G: the queries of a row that read the same keys.
  """
  B, T, N, H = q_BTNH.shape
  _, K, S, _ = pools.k.entries.shape
  G, P, W = N // K, len(pairs.rows), pairs_per_turn(B)
  q_BKQH = q_BTNH.reshape(B, T, K, G, H).swapaxes(1, 2).reshape(B, K, T * G, H)
  position_BQ = jnp.repeat(positions_BT, G, axis=1)

  def turn(i, carry):
    at = i * W
    rows, blocks, starts = (
      jax.lax.dynamic_slice_in_dim(x, at, W) for x in (pairs.rows, pairs.blocks, pairs.starts)
    )
    k, v = pools.read(blocks, q_BTNH.dtype)
    logits = jnp.einsum("WKQH,WKSH->WKQS", q_BKQH[rows], k, preferred_element_type=jnp.float32)
    logits = ops.softcap(pools.key_scaled(logits * spec.scale, blocks), spec.softcap)
    at_WS = starts[:, None] + jnp.arange(S)
    seen = _visible(position_BQ[rows][..., None], at_WS[:, None], spec.window)[:, None]
    logits = jnp.where(seen, logits, MASKED)
    most = logits.max(-1)
    weights = jnp.where(seen, jnp.exp(logits - most[..., None]), 0)
    out = jnp.einsum(
      "WKQS,WKSH->WKQH",
      pools.value_scaled(weights, blocks).astype(v.dtype),
      v,
      preferred_element_type=jnp.float32,
    )
    put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, at, 0)
    return tuple(map(put, carry, (most, weights.sum(-1), out)))

  # One entry more stays as it is, for rows that have fewer pairs than others.
  start = (
    jnp.full((P + 1, K, T * G), MASKED, jnp.float32),
    jnp.zeros((P + 1, K, T * G), jnp.float32),
    jnp.zeros((P + 1, K, T * G, pools.size), jnp.float32),
  )
  turns = (pairs.num + W - 1) // W
  most_BJ, sums_BJ, out_BJ = (x[pairs.table] for x in jax.lax.fori_loop(0, turns, turn, start))
  share_BJ = jnp.exp(most_BJ - most_BJ.max(1, keepdims=True))
  total = (share_BJ * sums_BJ).sum(1)
  out = (share_BJ[..., None] * out_BJ).sum(1) / jnp.maximum(total, 1e-30)[..., None]
  out_BTNH = out.reshape(B, K, T, G, -1).swapaxes(1, 2).reshape(B, T, N, -1)
  return out_BTNH.astype(q_BTNH.dtype)


def pairs_per_turn(num_rows: int) -> int:
  """W, the pairs that one turn of a step's loop computes. The size of `Pairs` is a multiple."""
  return max(num_rows, 2)


def _chunk(
  q_BTNH: jax.Array, pools: _Pools, call: Chunk, positions_T: jax.Array, spec: Spec
) -> jax.Array:
  """Attention of blocks of queries, a block of keys for each in each turn of the loop.

  Blocks of rows that need fewer turns than others see nothing in the last ones.
  """
  _, T, N, H = q_BTNH.shape
  _, K, S, _ = pools.k.entries.shape
  C, G = len(call.numbers), N // K
  q_CKGTH = q_BTNH[0].reshape(C, S, K, G, H).transpose(0, 2, 3, 1, 4)
  positions_CT = positions_T.reshape(C, S)

  def turn(j, carry):
    most, total, out = carry
    blocks = jnp.asarray(call.tables)[:, j]
    k, v = pools.read(blocks, q_BTNH.dtype)
    logits = jnp.einsum("CKGTH,CKSH->CKGTS", q_CKGTH, k, preferred_element_type=jnp.float32)
    logits = ops.softcap(pools.key_scaled(logits * spec.scale, blocks), spec.softcap)
    seen = _visible(positions_CT[..., None], j * S + jnp.arange(S), spec.window)[:, None, None]
    logits = jnp.where(seen, logits, MASKED)
    now = jnp.maximum(most, logits.max(-1))
    weights = jnp.where(seen, jnp.exp(logits - now[..., None]), 0)
    fade = jnp.exp(most - now)
    part = jnp.einsum(
      "CKGTS,CKSH->CKGTH",
      pools.value_scaled(weights, blocks).astype(v.dtype),
      v,
      preferred_element_type=jnp.float32,
    )
    return now, fade * total + weights.sum(-1), fade[..., None] * out + part

  first = jnp.int32(0)
  if spec.window is not None:
    first = jnp.maximum(positions_T.min() - spec.window + 1, 0) // S
  start = (
    jnp.full((C, K, G, S), MASKED, jnp.float32),
    jnp.zeros((C, K, G, S), jnp.float32),
    jnp.zeros((C, K, G, S, pools.size), jnp.float32),
  )
  _, total, out = jax.lax.fori_loop(first, call.numbers.max() + 1, turn, start)
  out = out / jnp.maximum(total, 1e-30)[..., None]
  return out.transpose(0, 3, 1, 2, 4).reshape(1, T, N, -1).astype(q_BTNH.dtype)
