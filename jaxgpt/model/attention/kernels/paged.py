"""JAX's Pallas kernel for the next token of each row over a paged cache, on TPUs.

It copies the blocks of a row from HBM while it computes those before, up to 1,024 tokens at a time.
With long contexts its time is that of reading the cache once. The loop of `attention.paged` takes
some ten microseconds more for each turn.

B row, T query, N heads, K key/value heads, H head size, M block of the pool, S slot of a block, J
block of a row.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.sharding import PartitionSpec

from jaxgpt.model.attention.spec import Spec
from jaxgpt.model.kv_cache import Pool
from jaxgpt.parallel import chips

_TOKENS = 1024  # of a row that the kernel computes at a time, at most
_MOST_ENTRIES = 65_536  # of the table, which lies in scalar memory
_ROWS_OF_TILE = 16  # of bfloat16: the kernel copies whole tiles


def supports(
  q_BTNH: jax.Array, k: Pool, v: Pool | None, tables_BJ: jax.Array | np.ndarray, spec: Spec
) -> bool:
  """Whether the kernel computes a call, on the mesh that `jax.set_mesh` has set.

  It reads pools in bfloat16 with heads of a multiple of 128, for one token of each row and without
  a window. A device that holds some query heads must hold their key heads.
  """
  if tables_BJ.size > _MOST_ENTRIES or k.entries.shape[2] % _ROWS_OF_TILE:
    return False
  _, T, N, H = q_BTNH.shape
  bf16 = jnp.bfloat16
  if T != 1 or v is None or spec.window is not None or H % chips.LANES:
    return False
  if not q_BTNH.dtype == k.entries.dtype == v.entries.dtype == bf16:
    return False
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else spec.rules.num_shards(mesh, "act_heads")
  return len(k.entries) % shards == 0 and N % shards == 0


def attend(
  q_BTNH: jax.Array,
  k: Pool,
  v: Pool,
  tables_BJ: jax.Array,
  positions_BT: jax.Array,
  spec: Spec,
) -> jax.Array:
  """Attends to the tokens of each query's own row up to the query's position.

  On chips whose two cores share a program it uses one of them.

  Args:
    q_BTNH: Queries, with T = 1.
    k: The pool of keys, with the call's own.
    v: The pool of values.
    tables_BJ: int32, the blocks of each row. Those after the query's are not read.
    positions_BT: Positions of the queries.
    spec: Scale and softcap.

  Returns:
    [B, 1, N, H] in q's dtype.
  """
  S, J = k.entries.shape[2], tables_BJ.shape[1]
  blocks = math.gcd(J, max(_TOKENS // S, 1))

  def local(q_BNH, k_KMSH, v_KMSH, lengths_B, tables_BJ):
    return paged_attention(
      q_BNH,
      k_KMSH,
      v_KMSH,
      lengths_B,
      tables_BJ,
      pages_per_compute_block=blocks,
      attn_logits_soft_cap=spec.softcap,
    )

  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1:
    q, pool = spec.rules.spec((None, "act_heads")), spec.rules.spec(("act_heads",))
    whole = PartitionSpec()
    local = jax.shard_map(
      local, in_specs=(q, pool, pool, whole, whole), out_specs=q, check_vma=False
    )
  # The kernel has no factor on the logits, and sums in the dtype of the queries.
  q_BNH = q_BTNH[:, 0].astype(jnp.float32) * spec.scale
  lengths_B = positions_BT[:, 0].astype(jnp.int32) + 1
  return local(q_BNH, k.entries, v.entries, lengths_B, tables_BJ)[:, None].astype(q_BTNH.dtype)
