"""Matmuls of rows that are grouped by expert, each group with the weight of its expert.

On TPUs this is the megablox kernel of JAX, which visits only the tiles that have rows. XLA's own
`ragged_dot` there needs 22 times the cycles of a dense matmul by its estimate (docs/log.md).

R rows, K and N sizes of a weight, e experts.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import megablox

from jaxgpt.parallel import chips

_ROWS, _FEW_ROWS = 512, 128  # of a tile; few where there are not at least four large tiles
_LARGEST = 1024  # tile of the other dimensions


def matmul(
  rows_RK: jax.Array, w_eKN: jax.Array, sizes_e: jax.Array, platform: str, interpret: bool = False
) -> jax.Array:
  """Multiplies each group of rows by a weight.

  Args:
    rows_RK: Rows, group after group. Rows after the last group are not multiplied.
    w_eKN: The weights.
    sizes_e: int32. Rows of each group.
    platform: Platform of the devices. 'tpu' uses the kernel, if the sizes are multiples of 128.
    interpret: Whether the kernel is interpreted, for tests without a TPU.

  Returns:
    [R, N] in the dtype of the rows. Rows after the last group are undefined, and so is their
    gradient.
  """
  R, K = rows_RK.shape
  if platform != "tpu" or K % chips.LANES or w_eKN.shape[-1] % chips.LANES:
    return jax.lax.ragged_dot(rows_RK, w_eKN, sizes_e)
  tile = _tile_of_rows(R)
  padded = jnp.pad(rows_RK, ((0, -R % tile), (0, 0)))
  out = megablox.gmm(padded, w_eKN, sizes_e, rows_RK.dtype, tiling, interpret=interpret)
  return out[:R]


def _tile_of_rows(rows: int) -> int:
  return _ROWS if rows >= 4 * _ROWS else _FEW_ROWS


def tiling(rows: int, k: int, n: int) -> tuple[int, int, int]:
  """The kernel's tiles: (rows, K, N). Of K and N as few as possible, of equal size."""
  even = lambda size: _up(-(-size // -(-size // _LARGEST)))
  return _tile_of_rows(rows), even(k), even(n)


def _up(size: int) -> int:
  return -(-size // chips.LANES) * chips.LANES
