"""Bytes of HBM that a decoding step moves on a TPU, relative to its weights and cache.

  python tests/benchmarks/decode_bytes.py [--rows=8] [--context=8192] [--layers=32]
                                          [--topology=v5e-8]      (needs jaxgpt[tpu], no TPU)

Compiles the engine's step of Llama 3 8B in bfloat16, sharded over `tensor`, and adds up what each
instruction of the program reads from HBM and writes to it, with full rows: the loop over blocks of
the cache runs as often as they need. Operands in VMEM cost nothing. A slice costs its own size, and
a scatter that the compiler marks as in place the entries that it writes.

The limit is to read each weight and each entry of the cache once. Of the embedding that is the rows
of the step's tokens. Fails above 1.3 times the limit, or if the program copies the cache.
"""

import argparse
import math
import re
import sys
import time

from jaxgpt.plan import environment

environment.prepare()

import jax

from jaxgpt import config
from jaxgpt.inference.engine import programs, rows, weights
from jaxgpt.model.attention import paged
from jaxgpt.parallel import sharding
from jaxgpt.plan import hlo, lower, topology
from jaxgpt.training import build

BLOCK = 64
MOST = 1.3
_TYPE = re.compile(r"\b(" + "|".join(hlo.DTYPE_BYTES) + r")\[([\d,]*)\](?:\{([^}]*)\})?")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota")
_SLICES = ("dynamic-slice", "slice", "gather")


def compiled(args):
  """(compiled step, shapes of the weights, of the cache) on abstract devices."""
  c, _ = config.load("configs/llama3_8b.py", [f"--config.model.num_layers={args.layers}"])
  c = lower.resolve(c).copy_and_resolve_references()
  where = topology.parse(args.topology)
  c.data.seq_len = args.context
  c.mesh.update(dict(data=1, fsdp=1, seq=1, tensor=where.num_devices))
  c.model.attention = "auto"
  mesh = topology.mesh(c.mesh, where)
  parts = build.build(c, mesh, for_training=False)
  model, prepared = weights.prepare(parts.model, "tpu")
  params = parts.state["params"]
  blocks = args.rows * args.context // BLOCK + 1
  size = programs.Size(args.rows, blocks, BLOCK, c.model.dtype)
  made = programs.Programs(model, c.model.vocab_size, size, mesh)
  batch = rows.Batch(args.rows, BLOCK, args.context, rows.windows(model.cfg), 1, "tpu")

  def shapes(function, *values):
    placed = function.lower(*values).compile().output_shardings
    sized = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(sized, jax.eval_shape(function, *values), placed)

  with jax.set_mesh(mesh):
    given, carried = shapes(prepared, params), shapes(made.empty)
    step = made.decode.lower(given, carried, batch.step([])).compile()
  return step, given, carried.pools


class Traffic:
  """What a program reads from HBM and writes to it.

  Attributes:
    copies: Instructions that make an array of the size of a pool of the cache in HBM.
  """

  def __init__(self, text, turns, pool):
    """Args: text: HLO. turns: Of each loop. pool: Entries of a layer's pool on a device."""
    self._program, self._turns, self._pool = hlo.parse(text), turns, pool
    self._sizes, self.copies = {}, []
    for line in text.splitlines():
      if found := re.match(r"  (?:ROOT )?%?([^\s=]+) = (.*)", line):
        self._sizes[found[1]] = [
          (
            math.prod(int(d) for d in dims.split(",") if d) * hlo.DTYPE_BYTES[dtype],
            "S(" not in layout,
          )
          for dtype, dims, layout in _TYPE.findall(_result(found[2]))
        ]

  def of(self, name=None):
    """Bytes of a run of a computation, in `entry` and in loops."""
    entry, loops = 0, 0
    for made in self._program.computations[name or self._program.entry]:
      if made.opcode == "while":
        loops += self._turns * sum(self.of(made.body))
      elif made.opcode == "conditional":  # the longest branch
        entry += max(sum(self.of(branch)) for branch in made.calls)
      elif made.opcode == "call":
        entry += sum(self.of(made.calls[0]))
      else:
        entry += self._instruction(made)
    return entry, loops

  def _hbm(self, name):
    return sum(size for size, is_there in self._sizes.get(name, ()) if is_there)

  def _instruction(self, made):
    op = made.opcode
    if op in _FREE or op.endswith("-done"):
      return 0
    if op in ("copy", "copy-start") and any(math.prod(a.dims) == self._pool for a in made.arrays):
      _, to_hbm = self._sizes[made.name][0]
      if to_hbm:  # into VMEM it is the read itself, which small pools allow
        self.copies.append(made.name)
    if op == "copy-start":  # (result, operand, …)
      return sum(size for size, is_there in self._sizes[made.name][:2] if is_there)
    if op.endswith("slice-start"):  # (operand, result, …)
      (_, from_hbm), (size, to_hbm) = self._sizes[made.name][:2]
      return size * (from_hbm + to_hbm)
    if op == "custom-call" and "ConcatBitcast" in made.attributes:
      return 0  # names slices that lie side by side
    body = self._program.computations.get(made.calls[0]) if made.calls else None
    if op.startswith("fusion") and body:
      return self._fusion(made, body)
    return sum(map(self._hbm, made.operands)) + self._hbm(made.name)

  def _fusion(self, made, body):
    operands = list(map(self._hbm, made.operands))
    in_place = '"aliasing_operands":{"lists":[{' in made.attributes
    if in_place and any(one.opcode in ("scatter", "dynamic-update-slice") for one in body):
      return 2 * (sum(operands) - max(operands))
    read = 0
    for one in body:
      if one.opcode == "parameter":
        size = operands[int(one.operands[0])]
        users = [user for user in _users(one, body) if user.opcode != "bitcast"]
        sliced = users and all(user.opcode in _SLICES for user in users)
        read += min(size, sum(user.bytes for user in users)) if sliced else size
    return read + self._hbm(made.name)


def _users(made, body):
  """Instructions that read another one, through bitcasts as well."""
  out = [one for one in body if made.name in one.operands]
  return out + [user for one in out if one.opcode == "bitcast" for user in _users(one, body)]


def _result(text):
  """The type of an instruction's result, from the text after '='."""
  depth = 0
  for i, char in enumerate(text):
    depth += (char == "(") - (char == ")")
    if char == " " and not depth:
      return text[:i]
  return text


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rows", type=int, default=8)
  parser.add_argument("--context", type=int, default=8192)
  parser.add_argument("--layers", type=int, default=32)
  parser.add_argument("--topology", default="v5e-8")
  args = parser.parse_args()
  began = time.monotonic()
  step, given, pools = compiled(args)
  pairs = args.rows * args.context // BLOCK
  turns = -(-pairs // paged.pairs_per_turn(args.rows, "tpu"))
  pool = jax.tree.leaves(pools)[0]
  traffic = Traffic(step.as_text(), turns, math.prod(pool.sharding.shard_shape(pool.shape)))
  entry, loops = traffic.of()
  cache = sharding.device_bytes(pools) * pairs / (pairs + 1)  # a block is spare
  limit = sharding.device_bytes(given) - sharding.device_bytes(given["embed"]) + cache
  ratio = (entry + loops) / limit
  temporary = step.memory_analysis().temp_size_in_bytes
  print(f"compiled for {args.topology} in {time.monotonic() - began:.0f} s")
  print(f"outside of loops {entry / 1e6:,.1f} MB, in loops over the cache {loops / 1e6:,.1f} MB")
  print(f"weights {(limit - cache) / 1e6:,.1f} MB, cache {cache / 1e6:,.1f} MB on a chip")
  print(
    f"temporary memory {temporary / 1e6:,.1f} MB, copies of the cache: {traffic.copies or 'none'}"
  )
  print(f"ratio to reading weights and cache once: {ratio:.3f}")
  if ratio > MOST or traffic.copies:
    sys.exit(f"above {MOST}, or the cache is copied")


if __name__ == "__main__":
  main()
