"""Bundles of attention kernels for each chip, head width and block size, from libtpu's schedules.

  python tests/benchmarks/attention_blocks.py [--again] [CHIP...]      (needs jaxgpt[tpu], no TPU)

Compiles splash attention, forward and backward, for causal rows with segments, and writes what it
finds to `jaxgpt/model/attention/blocks/measured.py`. A case takes 10 to 30 s on one core. Known
cases are left out, so an interrupted run goes on; `--again` compiles them again.
"""

import pathlib
import sys

from jaxgpt.plan import environment

environment.prepare()

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from jaxgpt.model.attention.blocks import choose, grid, measured
from jaxgpt.model.attention.masks import Band
from jaxgpt.parallel import chips
from jaxgpt.plan import topology
from jaxgpt.plan.schedule import bundles, dump
from jaxgpt.training import xla_options

FILE = pathlib.Path(measured.__file__)
# Large enough that no operand is in VMEM, and that two cores of a chip divide the rows.
ROWS, HEADS, KV_HEADS, LENGTH = 2, 32, 8, 8192
CHIPS = ("v6e", "v5e", "v5p")
SIZES = ((512, 512, 512), (1024, 1024, 512), (2048, 2048, 512), (1024, 2048, 512))
CASES = [(128, size, fused) for size in SIZES for fused in (True, False) if fused or size[1] < 2048]
CASES += [(256, (512, 512, 512), False), (256, (1024, 1024, 512), True)]


def compile_layer(splash, where, call, blocks):
  """Compiles the attention kernels of a layer, forward and backward, for a chip.

  Args:
    splash: A module of splash attention: JAX's, or MaxText's.
    where: The topology.
    call: A `grid.Call`: rows, heads and lengths.
    blocks: `choose.Blocks`.
  """
  mesh = jax.sharding.Mesh(np.array(topology.devices(where)[:1]), ("x",))
  sizes = splash.BlockSizes(**blocks.of_kernel())
  mask = masks.MultiHeadMask([masks.CausalMask((call.T, call.S))] * call.heads)

  def step(q, k, v, ids, dout):
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    one = lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash.SegmentIds(q=ids, kv=ids))
    out, vjp = jax.vjp(lambda q, k, v: jax.vmap(one)(q, k, v, ids), q, k, v)
    return out, vjp(dout)

  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  of = lambda heads: jax.ShapeDtypeStruct(
    (call.rows, heads, call.T, call.width), jnp.bfloat16, sharding=whole
  )
  ids = jax.ShapeDtypeStruct((call.rows, call.T), jnp.int32, sharding=whole)
  queries, keys = of(call.heads), of(call.kv_heads)
  dump.clear()
  return xla_options.compile(jax.jit(step).lower(queries, keys, keys, ids, queries), mesh)


def compiled(chip, width, size, fused):
  """Compiles a case: {kernel: schedule}."""
  where = topology.parse(f"{chip.name}-{4 * chip.cores}")
  call = grid.Call(ROWS, HEADS, KV_HEADS, LENGTH, LENGTH, width, Band(causal=True))
  names = [
    f"splash_mha_{kind}_segmented_{residuals}.{n}"
    for n in range(9)
    for kind, residuals in (("fwd", "residuals"), ("dq", "no_residuals"), ("dkv", "no_residuals"))
  ]
  compile_layer(splash, where, call, choose.Blocks(size, size, fused))
  found = dump.of_kernels(names)
  kinds = {name.split("_")[2]: bundles.parse(text) for name, text in found.items()}
  if fused:
    kinds["fused"] = kinds.pop("dkv")
  return kinds


def write(known):
  """Writes the table."""
  text = FILE.read_text()
  head = text[: text.index("] = {") + len("] = {")]
  rows = "".join(
    f"  {key!r}: {value!r},\n".replace("'", '"') for key, value in sorted(known.items())
  )
  FILE.write_text(f"{head}\n{rows}}}\n")


def main():
  known = dict(measured.MEASURED)
  again = "--again" in sys.argv[1:]
  for name in [a for a in sys.argv[1:] if not a.startswith("--")] or CHIPS:
    for width, size, fused in CASES:
      wanted = ("fwd", "fused") if fused else ("fwd", "dq", "dkv")
      if not again and all((name, width, kind, *size) in known for kind in wanted):
        continue
      try:
        found = compiled(chips.CHIPS[name], width, size, fused)
      except jax.errors.JaxRuntimeError as e:
        print(
          f"{name} {width} {size} fused {fused}: refused: {str(e).splitlines()[0][:200]}",
          flush=True,
        )
        continue
      for kind, schedule in found.items():
        key = (name, width, kind, *size)
        known[key] = schedule.step, schedule.block, schedule.ends
        print(f"{key}: {known[key]}", flush=True)
      write(known)


if __name__ == "__main__":
  main()
