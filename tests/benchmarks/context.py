"""Attention when a row of 131,072 tokens is cut over several chips: Llama-3-8B on v5p.

  python tests/benchmarks/context.py [--step] [--plain-blocks] [SEQ...]  (needs jaxgpt[tpu], no TPU)

Compiles the attention of one layer, forward and backward, for 16 chips. A row is cut over 2, 4, 8
and 16 of them, or over the given numbers. Prints the memory that the compiler allocates in
addition to queries, keys and values, and the time of the kernels by their schedules.
`--plain-blocks` compiles them with blocks of 512 and separate backward kernels. `--step` also
compiles train steps of two layers, one to two minutes each.
"""

import sys

from jaxgpt.plan import environment

environment.prepare()

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.model.attention import attention
from jaxgpt.model.attention.blocks import choose, grid
from jaxgpt.model.attention.spec import Spec
from jaxgpt.parallel import sharding
from jaxgpt.plan import cost, hlo, lower, topology
from jaxgpt.plan.schedule import dump, kernels

LENGTH = 131_072
CHIPS = 16
WHERE = "v5p-32"


def resolved(seq, layers):
  """Returns the config with each row cut over `seq` chips."""
  overrides = [
    f"--config.{key}={value}"
    for key, value in {
      "model.num_layers": layers,
      "model.max_len": LENGTH,
      "data.seq_len": LENGTH,
      "data.batch_size": CHIPS // seq,
      "mesh.seq": seq,
    }.items()
  ]
  return lower.resolve(config.load("configs/llama3_8b.py", overrides)[0])


def of_attention(c, mesh):
  """Compiles attention of one layer on a mesh.

  Returns:
    (bytes of q, k, v and their gradients on a chip, bytes of everything else that the compiler
    allocates, kernels).
  """
  m, rows = c.model, c.data.batch_size

  def backward(q, k, v, segments, dout):
    spec = Spec(scale=m.attn_scale, causal=True)
    f = lambda q, k, v: attention.attend("splash", q, k, v, None, segments, spec)
    out, vjp = jax.vjp(f, q, k, v)
    return out, vjp(dout)

  def shaped(heads, dtype=jnp.bfloat16):
    shape = (rows, LENGTH, *((heads, m.head_dim) if heads else ()))
    axes = ("batch", "length", "act_heads", None)[: len(shape)]
    # As inside a layer, where the compiler chooses the memory layout.
    cut = NamedSharding(mesh, sharding.DEFAULT.spec(axes))
    return jax.ShapeDtypeStruct(shape, dtype), Format(Layout.AUTO, cut)

  (q, of_q), (k, of_k), (ids, of_ids) = (
    shaped(m.num_heads),
    shaped(m.num_kv_heads),
    shaped(0, jnp.int32),
  )
  with jax.set_mesh(mesh):
    run = jax.jit(
      backward,
      in_shardings=(of_q, of_k, of_k, of_ids, of_q),
      out_shardings=(of_q, (of_q, of_k, of_k)),
    )
    dump.clear()
    compiled = run.lower(q, k, k, ids, q).compile()
  found = compiled.memory_analysis()
  calls = cost.of_program(hlo.parse(compiled.as_text())).calls
  return (
    found.argument_size_in_bytes + found.output_size_in_bytes,
    found.temp_size_in_bytes,
    kernels.of_step(calls, topology.parse(WHERE).chip, 1.0),
  )


def main():
  counts = [int(arg) for arg in sys.argv[1:] if arg.isdigit()] or (2, 4, 8, 16)
  where = topology.parse(WHERE)
  if "--plain-blocks" in sys.argv[1:]:
    choose.find = lambda call, chip: choose.plain(call.T, call.S, 512)
    grid.spread = lambda call, chip: 1
  print(f"{WHERE}, {CHIPS} chips, rows of {LENGTH:,} tokens, a row on `seq` chips; MiB of a chip")
  print("seq   q, k, v, out, gradients   attention's own   kernels, ms")
  for seq in counts:
    c = resolved(seq, 2)
    try:
      given, own, of_kernels = of_attention(c, topology.mesh(c.mesh, where))
    except UserError as e:
      sys.exit(str(e))
    took = sum(one.seconds for one in of_kernels) * 1e3
    print(
      f"{seq:>3}   {given / 2**20:>25,.0f}   {own / 2**20:>15,.0f}   {took:>11,.1f}", flush=True
    )
    for one in of_kernels:
      print(
        f"      {one.calls:g} x {one.name}: {one.seconds * 1e3:.1f} ms, {one.source} {one.reason}"
      )
  if "--step" not in sys.argv[1:]:
    return
  print("\nseq   parameters, optimizer   activations, temps   (a step, 2 layers)")
  for seq in counts:
    try:
      memory = lower.compile_step(resolved(seq, 2), where).memory
    except lower.OutOfMemory as e:
      print(f"{seq:>3}   does not fit: {e}", flush=True)
      continue
    print(
      f"{seq:>3}   {(memory.parameters + memory.optimizer) / 2**20:>21,.0f}   "
      f"{memory.temporaries / 2**20:>18,.0f}",
      flush=True,
    )


if __name__ == "__main__":
  main()
