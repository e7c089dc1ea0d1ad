"""Choice of block sizes for splash attention, by the schedules of `measured`.

Large blocks pay the costs of an iteration less often, and compute more pairs that the mask hides.
The fused backward kernel computes the attention weights once instead of twice, and writes the
gradient of the queries in parts that XLA adds up: one for each block of keys.

Numerics differ in the order of sums, and for the fused kernel in parts of the queries' gradient
that are rounded to the dtype of the queries.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxgpt.model.attention.blocks import grid
from jaxgpt.model.attention.blocks.grid import DKV, DQ, FORWARD, FUSED, Call
from jaxgpt.model.attention.blocks.measured import MEASURED
from jaxgpt.parallel import chips
from jaxgpt.parallel.chips import Chip

Size = tuple[int, int, int]  # queries and keys of a block, keys per matmul
# Fraction of a device's memory that the parts of the queries' gradient may take.
_PARTS = 1 / 24


class Blocks(NamedTuple):
  """Block sizes of the kernels.

  Attributes:
    forward: Of the forward kernel.
    backward: Of the backward kernels.
    fused: Whether one kernel computes all gradients.
  """

  forward: Size
  backward: Size
  fused: bool = False

  @property
  def kernels(self) -> tuple[tuple[str, Size], ...]:
    """The backward kernels with their sizes."""
    return tuple((name, self.backward) for name in ((FUSED,) if self.fused else (DQ, DKV)))

  def of_kernel(self) -> dict[str, Any]:
    """The fields of the kernel's `BlockSizes`."""
    out: dict[str, Any] = dict(
      zip(("block_q", "block_kv", "block_kv_compute"), self.forward, strict=True)
    )
    of_dkv = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    out |= zip(of_dkv, self.backward, strict=True)
    if self.fused:
      return out | {"use_fused_bwd_kernel": True}
    return out | dict(zip(("block_q_dq", "block_kv_dq"), self.backward, strict=False))


def plain(T: int, S: int, block: int) -> Blocks:
  """The same block for all kernels: as many tokens as fit the length, `block` at most."""
  q, kv = math.gcd(T, block), math.gcd(S, block)
  return Blocks((q, kv, kv), (q, kv, kv))


def find(call: Call, chip: Chip | None) -> Blocks:
  """The fastest measured blocks for a call.

  Args:
    call: The call.
    chip: The chip, or None for devices without an entry, such as CPUs.

  Returns:
    Blocks of `Chip.attention_block` tokens if nothing suitable is measured for the chip, the width
    of the heads and the length.
  """
  default = plain(call.T, call.S, chips.attention_block(chip))
  if chip is None:
    return default
  forward = {s: seconds(FORWARD, s, call, chip) for s in _sizes(FORWARD, call, chip)}
  backward = {
    (size, fused): backward_seconds(Blocks(size, size, fused), call, chip)
    for fused in (False, True)
    for size in _sizes(FUSED if fused else DKV, call, chip)
    if not fused or parts_bytes(size, call) <= _PARTS * chip.hbm_limit
  }
  known = {key: s for key, s in backward.items() if s is not None}
  if not forward or not known:
    return default
  (size, fused), _ = min(known.items(), key=lambda one: one[1])
  return Blocks(min(forward, key=lambda s: forward[s] or math.inf), size, fused)


def parts_bytes(size: Size, call: Call) -> int:
  """Bytes of the parts of the queries' gradient that the fused kernel writes."""
  return call.S // size[1] * call.query_bytes


def seconds(kernel: str, size: Size, call: Call, chip: Chip) -> float | None:
  """Seconds of one call of a kernel, or None if its blocks are not measured."""
  found = MEASURED.get((chip.name, call.width, kernel, *size))
  if found is None:
    return None
  step, block, ends = found
  runs = grid.of(kernel, call, *size[:2])
  cycles = step * runs.iterations + block * runs.blocks + ends * runs.ends
  out = cycles / grid.cores(kernel, call, chip) / chip.clock
  if kernel == FUSED:  # the parts are written by the kernel, and then read and added up
    out += (parts_bytes(size, call) + call.query_bytes) / chip.hbm_bandwidth
  return out


def backward_seconds(blocks: Blocks, call: Call, chip: Chip) -> float | None:
  """Seconds of all backward kernels of a call, or None if their blocks are not measured."""
  each = [seconds(kernel, size, call, chip) for kernel, size in blocks.kernels]
  return None if None in each else sum(s for s in each if s is not None)


def _sizes(kernel: str, call: Call, chip: Chip) -> Iterator[Size]:
  """The measured sizes that divide the lengths."""
  for name, width, of, q, kv, compute in MEASURED:
    fits = call.T % q == 0 and call.S % kv == 0
    if (name, width, of) == (chip.name, call.width, kernel) and fits:
      yield q, kv, compute
