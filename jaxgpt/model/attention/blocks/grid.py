"""The grid of a splash attention kernel: its iterations, and the blocks that the mask leaves.

`fwd` and `dq` finish a row of blocks of keys before the next queries. `dkv`, and `fused`, which
computes the gradient of the queries too, finish a column of blocks of queries before the next keys.
"""

import functools
import math
from typing import NamedTuple

from jaxgpt.model.attention.masks import Band
from jaxgpt.parallel.chips import Chip

FORWARD, DQ, DKV, FUSED = "fwd", "dq", "dkv", "fused"


class Call(NamedTuple):
  """The call of a kernel on one device.

  Attributes:
    rows: Rows of the batch.
    heads: Query heads.
    kv_heads: Key heads.
    T: Queries of a row.
    S: Keys of a row.
    width: Size of a head, padded as the kernel has it.
    band: The mask.
  """

  rows: int
  heads: int
  kv_heads: int
  T: int
  S: int
  width: int
  band: Band

  @property
  def query_bytes(self) -> int:
    """Bytes of the queries in bfloat16."""
    return 2 * self.rows * self.heads * self.T * self.width


class Grid(NamedTuple):
  """Counts for all heads and rows of a call.

  Attributes:
    iterations: Iterations of the grid.
    blocks: Those whose block is computed, because the mask does not hide all of it.
    ends: Rows or columns of blocks that the kernel finishes.
    pairs: All pairs of blocks, hidden or not.
  """

  iterations: int
  blocks: int
  ends: int
  pairs: int


@functools.lru_cache(maxsize=4096)  # a search asks for the same few calls thousands of times
def of(kernel: str, call: Call, block_q: int, block_k: int) -> Grid:
  """The grid of a kernel: FORWARD, DQ, DKV or FUSED."""
  visible = call.band.blocks(call.T, call.S, block_q, block_k)
  columns, heads = kernel in (DKV, FUSED), call.rows * call.heads
  # The grid is as wide as the fullest row or column, except for the fused kernel.
  width = int(visible.sum(0 if columns else 1).max())
  if kernel == FUSED:
    width = visible.shape[0]
  iterations = heads * visible.shape[1 if columns else 0] * width
  ends = call.rows * (
    call.kv_heads * visible.shape[1] if columns else call.heads * visible.shape[0]
  )
  return Grid(iterations, heads * int(visible.sum()), ends, heads * visible.size)


def spread(call: Call, chip: Chip | None) -> int:
  """Parts of the heads that count as rows of their own, so that two cores divide them.

  The backward kernels run on one of two cores if a device has an odd number of rows.
  """
  two = chip is not None and _cores_of(chip) == 2
  return 2 if two and call.rows % 2 and call.heads % 2 == 0 and call.kv_heads % 2 == 0 else 1


def spread_call(call: Call, chip: Chip | None) -> Call:
  """The call with `spread` parts of its heads as rows."""
  n = spread(call, chip)
  return call._replace(rows=call.rows * n, heads=call.heads // n, kv_heads=call.kv_heads // n)


def _cores_of(chip: Chip) -> int:
  return chip.cores // chip.devices if chip.libtpu else 1


def cores(kernel: str, call: Call, chip: Chip) -> int:
  """Cores that share a call, on chips with two cores that JAX shows as one device.

  They divide what the kernel declares parallel: rows of the batch, and the heads of FORWARD.
  """
  most = _cores_of(chip)
  divided = math.prod((call.rows, call.heads)) if kernel == FORWARD else call.rows
  return most if divided % most == 0 else 1
