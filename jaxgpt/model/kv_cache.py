"""The KV cache of decoding: keys and values of earlier tokens, so that each is computed once.

The cache is a plain tree of arrays: blocks in a pool, which rows of any length share
(`attention.paged`). It is an argument and a result of the model, and is never stored in it.

M block of a pool, S slot of a block, K key/value heads, H head size.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

LayerCache = dict[str, jax.Array]  # 'k' and 'v', or 'latent', each [M, K, S, H]
Pools = tuple[LayerCache, ...]  # for each layer


def pools(
  cfg: ml_collections.FrozenConfigDict, num_blocks: int, block_size: int, dtype: Any
) -> Pools:
  """An empty cache: for each layer pools [M, K, S, H].

  With latent attention a pool holds the compressed vector and the rotated key of all heads in one
  vector, which is the key of one head, followed by 1 where keys have a bias.

  Args:
    cfg: The config's `model` section.
    num_blocks: M.
    block_size: S, tokens of a block.
    dtype: dtype of the pools.
  """
  heads = {"k": (cfg.num_kv_heads, cfg.head_dim), "v": (cfg.num_kv_heads, cfg.head_dim)}
  if cfg.latent.kv_rank:
    heads = {"latent": (1, cfg.latent.kv_rank + cfg.latent.rope_dim + int(cfg.qkv_bias))}
  return tuple(
    {name: jnp.zeros((num_blocks, K, block_size, H), dtype) for name, (K, H) in heads.items()}
    for _ in range(cfg.num_layers)
  )
