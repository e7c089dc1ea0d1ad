"""Seconds of attention kernels by arithmetic, from measured blocks. The search ranks by them."""

import collections
from collections.abc import Iterator, Mapping

import ml_collections

from jaxgpt.config.keys.layer_kinds import attention_kinds
from jaxgpt.model.attention import halo
from jaxgpt.model.attention.blocks import choose, grid
from jaxgpt.model.attention.blocks.grid import Call
from jaxgpt.model.attention.masks import Band
from jaxgpt.parallel.chips import LANES, Chip, attention_block
from jaxgpt.plan import per_device
from jaxgpt.plan.per_device import Share


def seconds(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], chip: Chip
) -> tuple[float, float] | None:
  """(forward, backward) seconds of all layers' attention for one microbatch, on one device.

  Args:
    c: A resolved config.
    sizes: Sizes of the mesh axes, {axis: size}.
    chip: The chip.

  Returns:
    None if the blocks of a call are not measured: for GPUs, other chips and other heads.
  """
  forward = backward = 0.0
  for kind, layers in collections.Counter(attention_kinds(c.model)).items():
    for times, of in calls(c, sizes, kind, chip):
      call = grid.spread_call(of, chip)
      blocks = choose.find(call, chip)
      one = choose.seconds(grid.FORWARD, blocks.forward, call, chip)
      back = choose.backward_seconds(blocks, call, chip)
      if one is None or back is None:
        return None
      forward += layers * times * one
      backward += layers * times * back
  return forward, backward


def parts_bytes(c: ml_collections.ConfigDict, sizes: Mapping[str, int], chip: Chip) -> float:
  """Bytes of the parts of the queries' gradient that a fused backward kernel writes in a layer."""
  out = 0.0
  for kind in set(attention_kinds(c.model)):
    for _, of in calls(c, sizes, kind, chip):
      call = grid.spread_call(of, chip)
      blocks = choose.find(call, chip)
      if blocks.fused and sizes["seq"] == 1:  # rings compute a few heads at a time
        out = max(out, choose.parts_bytes(blocks.backward, call))
  return out


def calls(
  c: ml_collections.ConfigDict, sizes: Mapping[str, int], kind: str, chip: Chip | None = None
) -> Iterator[tuple[int, Call]]:
  """The kernels' calls of one layer on one device, as (times, call).

  Args:
    c: A resolved config.
    sizes: Sizes of the mesh axes.
    kind: 'local' or 'global', see model.attention_pattern.
    chip: The chip, whose block size a window's exchange follows. None: the default of kernels.
  """
  m, s = c.model, per_device.share(c, sizes)
  rows, n = max(round(s.rows), 1), sizes["seq"]
  window = m.window if kind == "local" else None
  whole = c.data.seq_len // n  # tokens of a row per device
  if n == 1:
    yield 1, _call(m, s, rows, whole, Band(m.causal, window))
  elif window is not None:  # see `attention.halo`
    yield 1, _call(m, s, 2 * rows, whole // 2, Band(m.causal, window))
    for _, reach, band in halo.reaches(m.causal, window, whole // 2, 2 * n, attention_block(chip)):
      yield 1, _call(m, s, 2 * rows, reach, band)
  elif m.causal:  # see `attention.ring`: both pairs of chunks are visible entirely
    yield 1, _call(m, s, rows, whole, Band(True))
    yield n - 1, _call(m, s, 2 * rows, whole // 2, Band())
  else:
    yield n, _call(m, s, rows, whole, Band())


def _call(m: ml_collections.ConfigDict, s: Share, rows: int, T: int, band: Band) -> Call:
  heads = max(m.num_heads // s.heads, 1)
  kv_heads = heads if m.latent.kv_rank else max(m.num_kv_heads // s.heads, 1)
  return Call(rows, heads, kv_heads, T, T, -(-m.head_dim // LANES) * LANES, band)
