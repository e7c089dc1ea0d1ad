"""The values that attention implementations share: options of a layer, sharding of rows, blocks.

They travel together from the layer down to the kernels. The options are hashable and hold no
arrays, so that `jax.jit` and `jax.custom_vjp` can treat them as static.

B batch, N heads, K key/value heads, T query, S key, H head size.
"""

from typing import NamedTuple

import jax

from jaxgpt.parallel import sharding


class Spec(NamedTuple):
  """How the queries of a layer attend to its keys.

  Attributes:
    scale: Factor on the logits, 1/sqrt(H) in most families.
    softcap: If given, logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118).
    causal: Whether a token attends only to itself and to earlier tokens.
    window: If given, a token attends only to tokens fewer than `window` positions away.
    rules: Logical axis rules, which say how the batch and the heads are sharded.
    interpret: Whether Pallas kernels run in interpret mode: on any backend, but slowly.
  """

  scale: float
  softcap: float | None = None
  causal: bool = False
  window: int | None = None
  rules: sharding.Rules = sharding.DEFAULT
  interpret: bool = False


class ContextParallel(NamedTuple):
  """How rows are sharded over devices, and how their blocks are computed.

  Attributes:
    spec: The options of the layer. If `causal`, tokens are in the order of `token_order.balance`.
    kernel: Implementation of a block: 'plain' or 'splash', see `blockwise`.
    axis: The mesh axis that shards rows.
    size: Number of devices along that axis.
  """

  spec: Spec
  kernel: str
  axis: str
  size: int


class Block(NamedTuple):
  """One block of queries and one block of keys.

  Attributes:
    q: Queries [B, N, T, H], already scaled.
    k: Keys [B, K, S, H].
    v: Values [B, K, S, H].
    q_ids: Segments of the queries, [B, 1, T].
    k_ids: Segments of the keys, [B, 1, S]. A token attends to its own segment. Segment 0 is
      padding, which no query of a 'plain' block attends to. No query attends to segment
      `blockwise.NO_SEGMENT`.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  q_ids: jax.Array
  k_ids: jax.Array


class BlockOutput(NamedTuple):
  """Attention of a block of queries to some of the keys, which `blockwise.merge` can extend.

  Attributes:
    out: [B, N, T, H].
    log_z: Logarithm of the softmax normalizer, [B, N, T] float32.
  """

  out: jax.Array
  log_z: jax.Array
