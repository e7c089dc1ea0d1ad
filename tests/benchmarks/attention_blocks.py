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

from jaxgpt.model.attention.blocks import choose, measured
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


def compiled(chip, width, size, fused):
  """Compiles a case: {kernel: schedule}."""
  where = topology.parse(f"{chip.name}-{4 * chip.cores}")
  mesh = jax.sharding.Mesh(np.array(topology.devices(where)[:1]), ("x",))
  blocks = splash.BlockSizes(**choose.Blocks(size, size, fused).of_kernel())
  mask = masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH))] * HEADS)

  def step(q, k, v, ids, dout):
    kernel = splash.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)
    one = lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash.SegmentIds(q=ids, kv=ids))
    out, vjp = jax.vjp(lambda q, k, v: jax.vmap(one)(q, k, v, ids), q, k, v)
    return out, vjp(dout)

  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  of = lambda heads: jax.ShapeDtypeStruct(
    (ROWS, heads, LENGTH, width), jnp.bfloat16, sharding=whole
  )
  ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=whole)
  dump.clear()
  lowered = jax.jit(step).lower(of(HEADS), of(KV_HEADS), of(KV_HEADS), ids, of(HEADS))
  names = [
    f"splash_mha_{kind}_segmented_{residuals}.{n}"
    for n in range(9)
    for kind, residuals in (("fwd", "residuals"), ("dq", "no_residuals"), ("dkv", "no_residuals"))
  ]
  xla_options.compile(lowered, mesh)
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
