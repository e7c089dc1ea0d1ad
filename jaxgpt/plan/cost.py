"""What a step of a compiled program takes: cycles, FLOPs, kernels, bytes between chips.

The cycles are those that the TPU compiler wrote beside each instruction of its schedule, times the
trips of the loops around it. They compare programs; they are no measurement.
"""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

from jaxgpt.plan import hlo

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "collective-broadcast",
)
# Matmuls of a call: the backward pass computes the weights anew in each of its kernels.
_ATTENTION_MATMULS = (
  ("splash_mha_fwd", 2),
  ("splash_mha_dq", 3),
  ("splash_mha_dkv", 4),
  ("splash_mqa_fwd", 2),
  ("splash_mqa_dq", 3),
  ("splash_mqa_dkv", 4),
)
_INLINE = ("fusion", "call", "conditional", "async-start")


@dataclasses.dataclass
class Cost:
  """Sums over a step on one device.

  Attributes:
    cycles: {'matmul', 'other'}: estimated by the compiler.
    flops: of the matmuls, as the program computes them (recomputation included).
    kernels: {name: [calls, FLOPs]} of custom kernels, for which the compiler has no estimate; of
      those of attention the FLOPs of all pairs of positions, of others 0.
    collectives: {(opcode, dtype, 'exposed', 'overlapped' or 'between'): [calls, bytes]}; the last
      go to other slices, over the data center's network.
    unhidden_bytes: of overlapped collectives, those that move for longer than there is something
      to compute beside them, in their computation.
  """

  cycles: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  flops: float = 0.0
  kernels: dict = dataclasses.field(default_factory=dict)
  collectives: dict = dataclasses.field(default_factory=dict)
  unhidden_bytes: float = 0.0

  def add(self, other, times=1):
    """Adds another cost so many times."""
    for key, value in other.cycles.items():
      self.cycles[key] += value * times
    self.flops += other.flops * times
    self.unhidden_bytes += other.unhidden_bytes * times
    for mine, its in ((self.collectives, other.collectives), (self.kernels, other.kernels)):
      for key, (calls, size) in its.items():
        entry = mine.setdefault(key, [0, 0.0])
        entry[0] += calls * times
        entry[1] += size * times

  def bytes(self, phase):
    """Bytes of the collectives that are 'exposed', 'overlapped' or 'between' slices."""
    return sum(size for (_, _, p), (_, size) in self.collectives.items() if p == phase)


def of_program(program, bytes_per_cycle=0.0):
  """The `Cost` of a step.

  Args:
    program: an `hlo.Program`, as it is scheduled.
    bytes_per_cycle: of the interconnect; 0: everything asynchronous counts as hidden.
  """
  return _Walk(program, bytes_per_cycle).of(program.entry)


class Line(NamedTuple):
  """An instruction of the schedule, with all of its runs in a step.

  Attributes:
    name, op_name: see `hlo.Instruction`.
    runs: how often it runs.
    cycles, flops: of all of them.
    shapes: of its results, as text.
  """

  name: str
  op_name: str
  runs: int
  cycles: int
  flops: float
  shapes: str


def heaviest(program, most):
  """The `Line`s with the most cycles, at most so many."""
  walk, lines = _Walk(program, 0.0), []

  def visit(name, runs):
    for made in program.computations[name]:
      if made.opcode == "while":
        visit(made.attribute("body").lstrip("%"), runs * hlo.trip_count(program, name, made))
      elif made.cycles:
        shapes = " ".join(f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in made.arrays[:2])
        lines.append(
          Line(
            made.name, made.op_name, runs, made.cycles * runs, walk.flops(name, made) * runs, shapes
          )
        )

  visit(program.entry, 1)
  return sorted(lines, key=lambda line: -line.cycles)[:most]


class _Walk:
  """Costs of computations, each worked out once."""

  def __init__(self, program, bytes_per_cycle):
    self._program, self._rate = program, bytes_per_cycle
    self._costs, self._pieces = {}, {}

  def of(self, name):
    """The cost of one run of a scheduled computation: the entry, or a loop's body."""
    if name in self._costs:
      return self._costs[name]
    cost, channels, inner = Cost(), {}, Cost()
    for made in self._program.computations[name]:
      if made.opcode == "while":
        trips = hlo.trip_count(self._program, name, made)
        inner.add(self.of(made.attribute("body").lstrip("%")), trips)
        continue
      flops, kernels, pieces = self._inside(name, made)
      cost.flops += flops
      for kernel, work in kernels:
        entry = cost.kernels.setdefault(kernel, [0, 0.0])
        entry[0] += 1
        entry[1] += work
      cost.cycles["matmul" if flops else "other"] += made.cycles
      for channel, piece in pieces:
        channels.setdefault(channel, []).append(piece)
    for pieces in channels.values():
      _add_collective(cost, pieces)
    hidden = sum(cost.cycles.values()) * self._rate
    if self._rate:
      cost.unhidden_bytes = max(cost.bytes("overlapped") - hidden, 0.0)
    cost.add(inner)
    self._costs[name] = cost
    return cost

  def flops(self, computation, made):
    """FLOPs of one run of an instruction."""
    return self._inside(computation, made)[0]

  def _inside(self, computation, made):
    """(FLOPs, [(kernel, FLOPs)], [(channel, piece)]) of an instruction and what it is fused from."""
    if made.opcode in ("dot", "convolution"):
      return hlo.matmul_flops(self._program, computation, made), [], []
    base = made.opcode.removesuffix("-start")
    if base in COLLECTIVES:
      return 0, [], [_piece(made, base)]
    between = re.search(r'_xla_megascale_transfer_type="(\w+)"', made.attributes)
    if made.opcode == "send" and between:  # (what is sent, a context, a token)
      return (
        0,
        [],
        [
          (
            made.name,
            {
              "opcode": between[1].lower().replace("_", "-"),
              "phase": "between",
              "dtype": made.arrays[0].dtype,
              "bytes": made.arrays[0].bytes,
            },
          )
        ],
      )
    if made.opcode == "custom-call" and "tpu_custom_call" in made.attributes:
      return 0, [self._kernel(computation, made)], []
    if made.opcode not in _INLINE:
      return 0, [], []
    flops, kernels, pieces = 0, [], []
    for name in made.calls:
      f, k, p = self._fused(name)
      flops += f
      kernels += k
      pieces += p
    return flops, kernels, pieces

  def _kernel(self, computation, made):
    """(name, FLOPs); attention is known by its name and the shapes of its queries and keys."""
    name = re.sub(r"\.\d+$", "", made.name)
    matmuls = next((n for part, n in _ATTENTION_MATMULS if part in name), 0)
    types = {i.name: i.arrays for i in self._program.computations[computation]}
    heads = [
      a[0].dims
      for a in map(types.get, made.operands)
      if a and len(a[0].dims) in (3, 4) and a[0].dtype in ("bf16", "f16", "f32")
    ]
    if not matmuls or len(heads) < 2:
      return name, 0
    (*rows, queries, size), keys = heads[0], heads[1][-2]
    return name, 2 * matmuls * math.prod(rows) * queries * keys * size

  def _fused(self, name):
    """Sums over a computation that is part of an instruction."""
    if name not in self._pieces:
      flops, kernels, pieces = 0, [], []
      body = self._program.computations.get(name, [])
      for made in body:
        f, k, p = self._inside(name, made)
        flops += f
        kernels += k
        pieces += p
      text = " ".join(made.attributes for made in body if made.opcode == "custom-call")
      if "AsyncCollectiveStart" in text:
        pieces = [(channel, piece | {"phase": "start"}) for channel, piece in pieces]
      elif "AsyncCollectiveDone" in text or name.startswith("async_collective_fusion"):
        pieces = [(channel, piece | {"phase": "rest"}) for channel, piece in pieces]
      scatters = any(made.opcode == "dynamic-slice" for made in body)
      if scatters or "all-reduce-scatter" in name:
        pieces = [
          (
            channel,
            piece | {"opcode": "reduce-scatter"} if piece["opcode"] == "all-reduce" else piece,
          )
          for channel, piece in pieces
        ]
      self._pieces[name] = flops, kernels, pieces
    return self._pieces[name]


def _piece(made, opcode):
  """(channel, what is known of a collective at this place)."""
  size = made.bytes
  sizes = [a.bytes for a in made.arrays]
  if made.opcode.endswith("-start") and len(sizes) > 1:  # (operands, results, counters)
    size = max(sizes) if opcode != "all-reduce" else size / 2
  channel = made.attribute("channel_id") or made.name
  return channel, {
    "opcode": opcode,
    "dtype": made.arrays[0].dtype,
    "bytes": size,
    "phase": "start" if made.opcode.endswith("-start") else "whole",
  }


def _add_collective(cost, pieces):
  """Counts the pieces of one collective, which may be spread over several fusions, once each."""
  starts = [p for p in pieces if p["phase"] == "start"]
  wholes = [p for p in pieces if p["phase"] == "whole"]
  between = [p for p in pieces if p["phase"] == "between"]
  for piece, phase in [
    *((p, "overlapped") for p in starts),
    *((p, "exposed") for p in wholes),
    *((p, "between") for p in between),
  ]:
    entry = cost.collectives.setdefault((piece["opcode"], piece["dtype"], phase), [0, 0.0])
    entry[0] += 1
    entry[1] += piece["bytes"]
