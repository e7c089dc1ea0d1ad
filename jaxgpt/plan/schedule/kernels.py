"""Seconds of splash attention's kernels, from their schedules and the blocks that masks leave.

A kernel's grid has an iteration for each head and each pair of a block of queries and a block of
keys. The kernels `fwd` and `dq` finish a row of blocks of keys before the next queries, `dkv` a
column of queries before the next keys. With the bundles of `bundles.Schedule`,

    cycles = outside + step * iterations + block * blocks + ends * rows or columns

where *blocks* are those that the mask does not hide. Iterations are fewer than all pairs if the
mask hides the same number of blocks in each row, as a window does. On chips with two cores that JAX
shows as one device, a dimension that the kernel declares parallel is divided over both: the heads
of `fwd`, and otherwise the rows of the batch if there are at least two.

Memory traffic runs in parallel with the bundles, so the longer of the two counts.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxgpt.model.attention import masks
from jaxgpt.model.attention.blocks import grid
from jaxgpt.model.attention.masks import Band
from jaxgpt.parallel.chips import Chip
from jaxgpt.plan.cost import Call
from jaxgpt.plan.schedule import bundles, dump
from jaxgpt.plan.schedule.bundles import NotUnderstood, Schedule, Window

_FLOATS = ("bf16", "f16", "f32")
_SUBLANES = 8  # rows of the small arrays with one value for each key (`fwd`, `dq`) or query (`dkv`)
# MaxText's names go on with the block sizes of all kernels, such as block_q_dq.
_KIND = re.compile(rf"splash_m[hq]a_({grid.FORWARD}|{grid.DQ}|{grid.DKV})")


class Mask(NamedTuple):
  """The mask of a kernel's call: T queries against S keys under a band."""

  band: Band
  T: int
  S: int


@dataclasses.dataclass(frozen=True)
class Counted:
  """The time of one call of a kernel.

  Attributes:
    cycles: Bundles that a core issues.
    bytes: Bytes copied between HBM and VMEM, for all cores.
    seconds: The longer of the two.
    cores: Cores that share the grid.
    blocks: Computed blocks of all heads.
    pairs: All blocks, hidden or not.
  """

  cycles: float
  bytes: float
  seconds: float
  cores: int
  blocks: int
  pairs: int


def count(name: str, text: str, mask: Mask, chip: Chip) -> Counted:
  """Counts the time of one call of a splash attention kernel.

  Args:
    name: The kernel's name, such as 'splash_mha_fwd_segmented_residuals'.
    text: Its schedule, from `dump.of_kernels`.
    mask: The mask of the call.
    chip: The chip.

  Raises:
    NotUnderstood: The schedule, its operands or its grid are not those of splash attention.
  """
  return of_schedule(name, bundles.parse(text), mask, chip)


def of_schedule(name: str, found: Schedule, mask: Mask, chip: Chip) -> Counted:
  """As `count`, for a parsed schedule."""
  inputs = [w for w in found.windows if w.kind == "input" and w.part.dtype in _FLOATS]
  if len(inputs) < 3 or len(inputs[0].whole.dims) < 3:
    raise NotUnderstood("no queries, keys and values among the operands")
  q, k, v, *_ = inputs
  (*rows, heads, length, _), (*_, kv_heads, keys, _) = q.whole.dims, k.whole.dims
  if (length, keys) != (mask.T, mask.S):
    raise NotUnderstood(f"operands of {length} x {keys} tokens, a mask of {mask.T} x {mask.S}")
  outputs = [w for w in found.windows if w.kind == "output"]
  kind = _KIND.search(name)
  kernel = kind[1] if kind else grid.FORWARD
  if kernel == grid.DKV and len(outputs) > 2:
    kernel = grid.FUSED
  call = grid.Call(math.prod(rows), heads, kv_heads, length, keys, q.whole.dims[-1], mask.band)
  runs = grid.of(kernel, call, q.part.dims[-2], k.part.dims[-2])
  cores, rest = divmod(runs.iterations, math.prod(found.grid or (runs.iterations,)))
  if rest or cores not in (1, chip.cores // chip.devices):
    raise NotUnderstood(f"a grid of {found.grid}, where the mask has {runs.iterations} iterations")
  per_core = found.step * runs.iterations + found.block * runs.blocks + found.ends * runs.ends
  cycles = found.outside + per_core / cores
  columns = kernel in (grid.DKV, grid.FUSED)
  moved = 0.0
  for window in found.windows:
    if window.memory == "hbm":
      times = runs.blocks if _follows_blocks(window, (q, k, v), columns) else runs.ends
      # Fused, the first output is the gradient of the queries, a part for each block of keys.
      parts = kernel == grid.FUSED and window is outputs[0]
      moved += window.part.bytes * (runs.iterations if parts else times)
  seconds = max(cycles / chip.clock, moved / chip.hbm_bandwidth)
  return Counted(cycles, moved, seconds, cores, runs.blocks, runs.pairs)


def _follows_blocks(window: Window, qkv: tuple[Window, ...], columns: bool) -> bool:
  """Whether a window moves with each block, rather than with each row or column of blocks."""
  if window.kind == "output":
    return False
  if any(window is one for one in qkv):
    return (window is qkv[0]) == columns
  # Gradients and statistics of the queries in `dkv`; ids of the inner blocks have 8 rows.
  return window.part.dims[-2] == _SUBLANES or (columns and window.part.dtype in _FLOATS)


ASSUMED_RATE = 0.5  # fraction of the peak that a kernel is assumed to reach without a schedule
# Of the grouped matmul of experts. Its main segment for tiles of 512 x 1,024 x 1,024 on v6e has
# 2,330 bundles, for the weights' gradient 2,695, where the MXU at its peak would need 2,048.
GROUPED_RATE = 0.8
SCHEDULE, ASSUMED, GROUPED = "schedule", "assumed", "grouped"
_NO_SCHEDULE = "libtpu wrote no schedule, as for a program from JAX's compilation cache"


class Kernel(NamedTuple):
  """A kernel's part of a step, on one device.

  Attributes:
    name: The kernel's name.
    calls: Calls per step.
    seconds: Seconds of all calls.
    flops: FLOPs of all calls, without blocks that the mask hides.
    cycles: Bundles of all calls, or 0 if they are not counted.
    source: Where the seconds come from: SCHEDULE, ASSUMED, or GROUPED for an even load of experts
      at `GROUPED_RATE`.
    reason: Why they are assumed, or ''.
  """

  name: str
  calls: float
  seconds: float
  flops: float
  cycles: float
  source: str
  reason: str = ""


def of_step(
  calls: Mapping[Call, list[float]],
  chip: Chip,
  share: float,
  room: float = 1.0,
  mask: Mask | None = None,
  folder: pathlib.Path | None = None,
) -> list[Kernel]:
  """The kernels of a compiled step, one for each call in the program.

  Args:
    calls: From `cost.Cost`.
    chip: The chip.
    share: Fraction of the pairs of blocks that attention kernels compute, for those whose
      mask is not in the program.
    room: Rows that grouped matmuls have room for, over those of an even load.
    mask: The mask of attention kernels whose instruction does not name it.
    folder: The folder with the schedules, if another process compiled the program.
  """
  texts = dump.of_kernels((call.instruction for call in calls), folder)
  # libtpu writes one schedule for equal instructions: same kernel, same mask, same size.
  alike = lambda call: (call.name, masks.read_label(call.op_name), calls[call][1] / calls[call][0])
  twins = {alike(call): texts[call.instruction] for call in calls if call.instruction in texts}
  text_of = lambda call: texts.get(call.instruction) or twins.get(alike(call))
  return [
    _grouped(call, runs, flops / room, chip)
    if "gmm" in call.name
    else _of_call(call, runs, flops, text_of(call), chip, share, mask)
    for call, (runs, flops) in calls.items()
  ]


def _grouped(call: Call, runs: float, flops: float, chip: Chip) -> Kernel:
  """A grouped matmul. Its loops depend on the load of the experts, so no schedule has them."""
  seconds = flops / (chip.clocked_flops * GROUPED_RATE)
  return Kernel(call.name, runs, seconds, flops, 0.0, GROUPED)


def _of_call(
  call: Call,
  runs: float,
  flops: float,
  text: str | None,
  chip: Chip,
  share: float,
  mask: Mask | None,
) -> Kernel:
  """The `Kernel` of a call, from its schedule if there is one."""
  label = masks.read_label(call.op_name) or mask
  reason = _NO_SCHEDULE if text is None else "its mask is not known"
  if label and text is not None:
    mask = Mask(*label)
    try:
      found = count(call.name, text, mask, chip)
    except NotUnderstood as e:
      reason = str(e)
    else:
      visible = found.blocks / found.pairs
      return Kernel(
        call.name, runs, found.seconds * runs, flops * visible, found.cycles * runs, SCHEDULE
      )
  seconds = flops * share / (chip.clocked_flops * ASSUMED_RATE)
  return Kernel(call.name, runs, seconds, flops * share, 0.0, ASSUMED, reason)
