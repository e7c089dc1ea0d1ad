"""Attention kernels of MaxText's recipes and of our plans, compiled alone and counted alike.

  python tests/benchmarks/maxtext_attention.py [WORKLOAD...]

The workloads are those of `plan_maxtext.py`, which compiles whole steps and needs hours on a busy
machine for what takes minutes here. Needs libtpu, but no TPU, and MaxText's kernel (`pip install
'maxtext[tpu]==0.2.5'`, Python 3.12). Both sides compile forward and backward kernels for the rows
and heads of a chip, and the bundles of their final schedules are counted by the same code.
"""

import sys
from typing import NamedTuple

from jaxgpt.plan import environment

environment.prepare()

import attention_blocks
import plan_maxtext
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as jax_splash

from jaxgpt.config import presets
from jaxgpt.model.attention.blocks import choose, grid
from jaxgpt.model.attention.masks import Band
from jaxgpt.plan import cost, hlo, per_device, topology
from jaxgpt.plan.schedule import kernels

WIDTH = 128  # of a head
BLOCK = 512  # MaxText's default for all blocks, with separate backward kernels


class Side(NamedTuple):
  """Attention of a plan on one chip.

  Attributes:
    call: Its call, of one layer.
    blocks: Its blocks.
    forward: How often a layer runs the forward kernel: twice if its result is not saved.
    tokens: Tokens of a chip.
  """

  call: grid.Call
  blocks: choose.Blocks
  forward: int
  tokens: int


def sides(work):
  """{name: `Side`} of a workload, as `plan_maxtext.py` names them."""
  m, chip = presets.PRESETS[work.preset], topology.parse(work.where).chip
  heads, kv_heads, T = m["num_heads"], m["num_kv_heads"], work.length

  def ours(plan):
    rows, tensor = plan.rows, plan.tensor
    call = grid.Call(rows, heads // tensor, kv_heads // tensor, T, T, WIDTH, Band(causal=True))
    call = grid.spread_call(call, chip)
    saved = "attention" in per_device.saved_names(plan.remat)
    return Side(call, choose.find(call, chip), 1 if saved else 2, rows * T // tensor)

  rows, _ = work.theirs  # none of the recipes' policies saves MaxText's "context"
  call = grid.Call(rows, heads, kv_heads, T, T, WIDTH, Band(causal=True))
  return {
    "maxtext": Side(call, choose.plain(T, T, BLOCK), 2, rows * T),
    "same": ours(plan_maxtext.Plan(rows, work.same)),
    "best": ours(work.ours),
  }


def seconds(side, where, splash):
  """Compiles the kernels of a layer: [`Kernel`]."""
  call, chip = side.call, where.chip
  compiled = attention_blocks.compile_layer(splash, where, call, side.blocks)
  calls = cost.of_program(hlo.parse(compiled.as_text())).calls
  return kernels.of_step(calls, chip, 0.5, mask=kernels.Mask(call.band, call.T, call.S))


def _adding(side, chip):
  """Seconds in which XLA adds up the parts of the queries' gradient of a fused kernel."""
  moved = choose.parts_bytes(side.blocks.backward, side.call) + side.call.query_bytes
  return moved / chip.hbm_bandwidth if side.blocks.fused else 0.0


def main(names):
  from maxtext.kernels.attention import splash_attention_kernel as maxtext_splash

  for name in names or plan_maxtext.WORKLOADS:
    work, found = plan_maxtext.WORKLOADS[name], {}
    where = topology.parse(work.where)
    layers = presets.PRESETS[work.preset]["num_layers"]
    for word, side in sides(work).items():
      parts = seconds(side, where, maxtext_splash if word == "maxtext" else jax_splash)
      once = _adding(side, where.chip) + sum(
        one.seconds * (side.forward if "_fwd" in one.name else 1) for one in parts
      )
      found[word] = once * layers / side.tokens * 1e6
      each = ", ".join(
        f"{one.name[:24]} {one.seconds * 1e3:.3f} ms {one.source} {one.reason}" for one in parts
      )
      print(
        f"{name}: {word}, {side.call.rows} rows of {side.call.heads} heads, {side.blocks}, forward "
        f"{side.forward} x: {each}; {found[word]:.1f} µs per token and chip",
        flush=True,
      )


if __name__ == "__main__":
  main(sys.argv[1:])
