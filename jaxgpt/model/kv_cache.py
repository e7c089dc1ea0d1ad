"""The KV cache of decoding: keys and values of earlier tokens, so that each is computed once.

The cache is a plain tree of arrays: blocks in a pool, which rows of any length share
(`attention.paged`). It is an argument and a result of the model, and is never stored in it.

In int8 each vector of a token and a head has a scale of its own, max |x| / 127, in float32. Neither
other tokens nor other heads change its error, which is at most half a scale in each entry.

M block of a pool, S slot of a block, K key/value heads, H head size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

INT8 = "int8"


class Pool(NamedTuple):
  """Vectors of tokens.

  Attributes:
    entries: [K, M, S, H], heads first, as attention kernels read them.
    scales: float32 [K, M, S], which the entries are multiplied with, or None.
  """

  entries: jax.Array
  scales: jax.Array | None = None


LayerCache = dict[str, Pool]  # 'k' and 'v', or 'latent'
Pools = tuple[LayerCache, ...]  # for each layer


def quantized(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(int8, float32 scales) of vectors along the last axis, rounded to the nearest."""
  x = x.astype(jnp.float32)
  scales = jnp.abs(x).max(-1) / 127
  entries = jnp.round(x / jnp.maximum(scales, 1e-30)[..., None])
  return entries.astype(jnp.int8), scales


def pools(
  cfg: ml_collections.FrozenConfigDict, num_blocks: int, block_size: int, dtype: Any
) -> Pools:
  """An empty cache: pools for each layer.

  With latent attention a pool holds the compressed vector and the rotated key of all heads in one
  vector, which is the key of one head, followed by 1 where keys have a bias.

  Args:
    cfg: The config's `model` section.
    num_blocks: M.
    block_size: S, tokens of a block.
    dtype: dtype of the pools, `INT8` for entries with scales.
  """
  heads = {"k": (cfg.num_kv_heads, cfg.head_dim), "v": (cfg.num_kv_heads, cfg.head_dim)}
  if cfg.latent.kv_rank:
    heads = {"latent": (1, cfg.latent.kv_rank + cfg.latent.rope_dim + int(cfg.qkv_bias))}

  def pool(K: int, H: int) -> Pool:
    shape = K, num_blocks, block_size
    scales = jnp.zeros(shape, jnp.float32) if dtype == INT8 else None
    return Pool(jnp.zeros((*shape, H), dtype), scales)

  return tuple({name: pool(*size) for name, size in heads.items()} for _ in range(cfg.num_layers))
