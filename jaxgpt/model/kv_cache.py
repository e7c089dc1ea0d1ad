"""The KV cache of decoding: keys and values of earlier tokens, so that each is computed once.

A cache is a plain tree of arrays. It is an argument and a result of the model, and is never stored
in it. There are two forms:

  slots   of a fixed number of rows. Slot s of a row holds the token at position s
  pages   blocks in a pool, which rows of any length share (`attention.paged`)

B batch, S cache slot, M block of a pool, K key/value heads, H head size.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt.model import stacks

LayerCache = dict[str, jax.Array]  # 'k' and 'v', or 'latent' and 'shared_key', each [B, S, ...]
Cache = dict[str, tuple[LayerCache, ...]]  # {stack: a cache for each block of the pattern}
Pools = tuple[LayerCache, ...]  # a paged cache: for each layer 'k' and 'v', or 'latent'


def init(cfg: ml_collections.FrozenConfigDict, batch_size: int, num_slots: int) -> Cache:
  """An empty cache.

  Args:
    cfg: The config's `model` section.
    batch_size: B.
    num_slots: S, the longest context in tokens.

  Returns:
    {stack: (cache of the first block of its pattern, ...)}, with arrays [repeats, B, S, ...].
  """
  one = layer_cache(cfg, batch_size, num_slots)
  stacked = lambda n: jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), one)
  return {s.name: tuple(stacked(s.repeats) for _ in s.kinds) for s in stacks.of(cfg)}


def layer_cache(
  cfg: ml_collections.FrozenConfigDict, batch_size: int, num_slots: int
) -> LayerCache:
  """An empty cache of one layer, in the compute dtype.

  It holds keys and values, [B, S, K, H] each. With latent attention it holds the compressed vector
  [B, S, kv_rank], from which they are computed, and the rotated key [B, S, 1, rope_dim] of all
  heads.
  """
  one = (cfg.num_kv_heads, cfg.head_dim)
  shapes: dict[str, tuple[int, ...]] = {"k": one, "v": one}
  if cfg.latent.kv_rank:
    shapes = {"latent": (cfg.latent.kv_rank,), "shared_key": (1, cfg.latent.rope_dim)}
  return {
    name: jnp.zeros((batch_size, num_slots, *shape), jnp.dtype(cfg.dtype))
    for name, shape in shapes.items()
  }


def pools(
  cfg: ml_collections.FrozenConfigDict, num_blocks: int, block_size: int, dtype: Any
) -> Pools:
  """An empty paged cache: for each layer pools [M, K, S, H].

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


def write(cache: LayerCache, new: LayerCache, positions_BT: jax.Array) -> LayerCache:
  """Writes new tokens into their slots.

  Args:
    cache: The cache of a layer.
    new: What to write, [B, T, ...] under the same names.
    positions_BT: Slots of the new tokens. Those of a row are consecutive.
  """

  def write_row(old, new, first):
    return jax.lax.dynamic_update_slice(old, new, (first,) + (0,) * (old.ndim - 1))

  # Rows may be at different positions, so each is updated at its own slot.
  first = positions_BT[:, 0]
  return {name: jax.vmap(write_row)(cache[name], x, first) for name, x in new.items()}
