"""Cost of a compiled TPU program: cycles, FLOPs, kernels and bytes between chips per step.

The TPU compiler writes an estimate of cycles next to each instruction of its schedule. The cost
sums them over the program, each times the trip counts of the loops around it:

    ENTRY                        1 x
      fusion.1      900 cycles
      while (32 layers)         32 x
        fusion.7    500 cycles        total = 900 + 32 * (500 + 80) + 70
        fusion.8     80 cycles
      conditional                1 x the branch with the most cycles
        fusion.9     70 cycles
        fusion.10    20 cycles

Of a conditional one branch runs: the optimizer's update, or nothing if a loss is not finite.
Cycles compare programs. They are not a measurement. Custom kernels such as attention have no
estimate next to them, so their calls and FLOPs are counted here, and `schedule` reads what libtpu
writes about them elsewhere. A collective that XLA splits over several fusions, in
order to overlap it with compute, counts once.
"""

import collections
import dataclasses
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

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
# Matmuls per call. Each of the backward kernels computes the attention weights again.
_ATTENTION_MATMULS = (
  ("splash_mha_fwd", 2),
  ("splash_mha_dq", 3),
  ("splash_mha_dkv", 4),
  ("splash_mqa_fwd", 2),
  ("splash_mqa_dq", 3),
  ("splash_mqa_dkv", 4),
)
_ATTENTION_DKV = ("splash_mha_dkv", "splash_mqa_dkv")
_FLOATS = ("bf16", "f16", "f32")
_INLINE = ("fusion", "call", "async-start")
TO_HOST, FROM_HOST = "to host", "from host"
_TWICE = ("all-reduce",)  # a ring reduces, then gathers: each takes the time of the whole array


class Call(NamedTuple):
  """A call of a custom kernel in a program.

  Attributes:
    instruction: Name of the instruction, such as 'splash_mha_fwd.3'.
    name: Name of the kernel, such as 'splash_mha_fwd'.
    op_name: See `hlo.Instruction`.
  """

  instruction: str
  name: str
  op_name: str


@dataclasses.dataclass
class Cost:
  """Sums over a step on one device.

  Attributes:
    cycles: {'matmul': cycles, 'other': cycles}, as estimated by the compiler.
    flops: FLOPs of the matmuls in the program, recomputation included.
    calls: {call of a custom kernel: [runs, FLOPs]}. For attention kernels the FLOPs of all
      query-key pairs, masked or not. For grouped matmuls those of all rows that there is room for.
      For others 0.
    collectives: {(opcode, dtype, phase): [calls, bytes]}. The phase is 'exposed', 'overlapped', or
      'between' for those that go to other slices over the data center network.
    unestimated: {kind: [runs, bytes, FLOPs]} of instructions without an estimate of the compiler,
      see `hlo.Instruction.unestimated`. The bytes are those of their results, read and written.
    unhidden_bytes: Bytes of overlapped collectives, as in `moved`, beyond those that the compute
      and the kernels of the same computation can hide.
    host_bytes: {TO_HOST: bytes, FROM_HOST: bytes} of activations that the host's memory keeps.
    host_wait_cycles: Cycles in which the program waits for them, see `_HostLink`.
    assumed_trips: {loop: runs of its body} of loops whose trip count is not found.
  """

  cycles: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  flops: float = 0.0
  calls: dict[Call, list[float]] = dataclasses.field(default_factory=dict)
  collectives: dict[tuple[str, str, str], list[float]] = dataclasses.field(default_factory=dict)
  unestimated: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  unhidden_bytes: float = 0.0
  host_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
  host_wait_cycles: float = 0.0
  assumed_trips: dict[str, int] = dataclasses.field(default_factory=dict)

  def add(self, other: "Cost", times: int = 1) -> None:
    """Adds another cost, multiplied by `times`."""
    for key, value in other.cycles.items():
      self.cycles[key] += value * times
    self.flops += other.flops * times
    self.unhidden_bytes += other.unhidden_bytes * times
    for way, size in other.host_bytes.items():
      self.host_bytes[way] = self.host_bytes.get(way, 0.0) + size * times
    self.host_wait_cycles += other.host_wait_cycles * times
    self.assumed_trips |= other.assumed_trips
    pairs: tuple[tuple[dict[Any, list[float]], dict[Any, list[float]]], ...] = (
      (self.collectives, other.collectives),
      (self.calls, other.calls),
    )
    for mine, its in pairs:
      for key, (calls, size) in its.items():
        entry = mine.setdefault(key, [0, 0.0])
        entry[0] += calls * times
        entry[1] += size * times
    for kind, sums in other.unestimated.items():
      self._add_unestimated(kind, [value * times for value in sums])

  def _add_unestimated(self, kind: str, sums: Sequence[float]) -> None:
    before = self.unestimated.get(kind, (0.0,) * len(sums))
    self.unestimated[kind] = [a + b for a, b in zip(before, sums, strict=True)]

  def unestimated_seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
    """Seconds of the instructions without an estimate: a roofline of their bytes and FLOPs."""
    return sum(
      max(size / bytes_per_second, flops / flops_per_second)
      for _, size, flops in self.unestimated.values()
    )

  @property
  def kernels(self) -> dict[str, list[float]]:
    """{name: [calls, FLOPs]} of custom kernels, the sum of all calls of a kernel."""
    out: dict[str, list[float]] = {}
    for call, (runs, work) in self.calls.items():
      entry = out.setdefault(call.name, [0, 0.0])
      entry[0] += runs
      entry[1] += work
    return out

  def bytes(self, phase: str) -> float:
    """Bytes of the arrays of a phase: 'exposed', 'overlapped' or 'between' slices."""
    return sum(size for (_, _, p), (_, size) in self.collectives.items() if p == phase)

  def moved(self, phase: str) -> float:
    """Bytes that take the time of a phase, 'exposed' or 'overlapped': all-reduces count twice."""
    return sum(
      size * (2 if opcode in _TWICE else 1)
      for (opcode, _, p), (_, size) in self.collectives.items()
      if p == phase
    )


def of_program(
  program: hlo.Program,
  bytes_per_cycle: float = 0.0,
  kernel_cycles: Mapping[Call, float] = types.MappingProxyType({}),
  host_bytes_per_cycle: float = 0.0,
) -> Cost:
  """The cost of one step of a program.

  Args:
    program: A scheduled program.
    bytes_per_cycle: Bandwidth of the interconnect. 0: all asynchronous collectives count as hidden.
    kernel_cycles: Cycles of one run of kernels. They hide collectives, and are not in the cycles of
      the result.
    host_bytes_per_cycle: Bandwidth to the host's memory, one direction. 0: these transfers count as
      hidden.
  """
  return _Walk(program, bytes_per_cycle, kernel_cycles, host_bytes_per_cycle).of(program.entry)


class Line(NamedTuple):
  """An instruction of the schedule, with all of its runs in a step.

  Attributes:
    name: See `hlo.Instruction`.
    op_name: See `hlo.Instruction`.
    runs: Number of runs per step.
    cycles: Cycles of all runs.
    flops: FLOPs of all runs.
    shapes: Types of its results, as text.
  """

  name: str
  op_name: str
  runs: int
  cycles: int
  flops: float
  shapes: str


def heaviest(program: hlo.Program, most: int) -> list[Line]:
  """The instructions with the most cycles, at most `most` of them."""
  walk, lines = _Walk(program, 0.0, {}), []

  def visit(name: str, runs: int) -> None:
    for made in program.computations[name]:
      if made.opcode == "while":
        visit(made.body, runs * hlo.trips(program, name, made).runs)
      elif branch := walk.branch(made):
        visit(branch, runs)
      elif made.cycles:
        shapes = " ".join(f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in made.arrays[:2])
        lines.append(
          Line(
            made.name, made.op_name, runs, made.cycles * runs, walk.flops(name, made) * runs, shapes
          )
        )

  visit(program.entry, 1)
  return sorted(lines, key=lambda line: -line.cycles)[:most]


# Parts of a collective at one place of the program: (channel, {'opcode', 'dtype', 'bytes',
# 'phase'}). The parts of one collective have the same channel. The phase of a part is
#   whole     a synchronous collective
#   start     the start of an asynchronous one
#   rest      a fusion in which an asynchronous one makes progress, or its end
#   between   a send to another slice
_Part: TypeAlias = tuple[str, dict[str, Any]]
_Sums: TypeAlias = tuple[float, list[tuple[Call, float]], list[_Part]]  # FLOPs, kernels, parts


class _Walk:
  """Computes the cost of each computation of a program once."""

  def __init__(
    self,
    program: hlo.Program,
    bytes_per_cycle: float,
    kernel_cycles: Mapping[Call, float],
    host_bytes_per_cycle: float = 0.0,
  ):
    self._program, self._rate, self._kernel_cycles = program, bytes_per_cycle, kernel_cycles
    self._host_rate = host_bytes_per_cycle
    self._costs: dict[str, Cost] = {}
    self._sums: dict[str, _Sums] = {}

  def of(self, name: str) -> Cost:
    """The cost of one run of a scheduled computation: the entry, a loop's body, or a branch."""
    if name in self._costs:
      return self._costs[name]
    cost, inner, kernel_cycles, link = Cost(), Cost(), 0.0, _HostLink(self._host_rate)
    channels: dict[str, list[dict[str, Any]]] = {}
    for made in self._program.computations[name]:
      if made.opcode == "while":
        trips = hlo.trips(self._program, name, made)
        inner.add(self.of(made.body), trips.runs)
        link.compute(trips.runs * self._duration(self.of(made.body)))
        if not trips.known:
          inner.assumed_trips[made.name] = trips.runs
        continue
      if branch := self.branch(made):
        inner.add(self.of(branch))
        link.compute(self._duration(self.of(branch)))
        continue
      flops, kernels, parts = self._inside(name, made)
      cost.flops += flops
      for kernel, work in kernels:
        entry = cost.calls.setdefault(kernel, [0, 0.0])
        entry[0] += 1
        entry[1] += work
        kernel_cycles += self._kernel_cycles.get(kernel, 0)
        link.compute(self._kernel_cycles.get(kernel, 0))
      link.compute(made.cycles)
      link.move(made)
      cost.cycles["matmul" if flops else "other"] += made.cycles
      if made.unestimated and not kernels and not parts:
        cost._add_unestimated(made.unestimated, [1, 2 * _result_bytes(made), flops])
      for channel, part in parts:
        channels.setdefault(channel, []).append(part)
    cost.host_bytes, cost.host_wait_cycles = link.bytes, link.waited
    for pieces in channels.values():
      _add_collective(cost, pieces)
    # Overlapped bytes move while this computation runs; those that take longer are not hidden.
    cycles = sum(cost.cycles.values()) + kernel_cycles
    if self._rate:
      cost.unhidden_bytes = max(cost.moved("overlapped") - cycles * self._rate, 0.0)
    cost.add(inner)
    self._costs[name] = cost
    return cost

  def _duration(self, cost: Cost) -> float:
    """Cycles of a computation, its kernels and its waits for the host included."""
    kernels = sum(runs * self._kernel_cycles.get(call, 0) for call, (runs, _) in cost.calls.items())
    return sum(cost.cycles.values()) + kernels + cost.host_wait_cycles

  def branch(self, made: hlo.Instruction) -> str:
    """The scheduled computation that an instruction runs, or ''.

    Of a conditional, which has no estimate of its own, this is the branch with the most cycles.
    """
    if made.opcode == "conditional":
      return max(made.calls, key=self._size)
    return made.calls[0] if made.opcode == "call" and not (made.cycles or made.unestimated) else ""

  def _size(self, name: str) -> tuple[float, ...]:
    """What branches are compared by: cycles; in programs without estimates FLOPs, then bytes."""
    cost = self.of(name)
    flops = cost.flops + sum(work for _, work in cost.calls.values())
    return sum(cost.cycles.values()), flops, sum(size for _, size in cost.collectives.values())

  def flops(self, computation: str, made: hlo.Instruction) -> float:
    """FLOPs of one run of an instruction."""
    return self._inside(computation, made)[0]

  def _inside(self, computation: str, made: hlo.Instruction) -> _Sums:
    """FLOPs, kernels and collectives of an instruction, fused computations included."""
    if made.opcode in ("dot", "convolution"):
      return hlo.matmul_flops(self._program, computation, made), [], []
    base = made.opcode.removesuffix("-start")
    if base in COLLECTIVES:
      return 0, [], [_part_of(self._program, computation, made, base)]
    between = re.search(r'_xla_megascale_transfer_type="(\w+)"', made.attributes)
    if made.opcode == "send" and between:
      sent = made.arrays[0]  # followed by a context and a token
      part = {
        "opcode": between[1].lower().replace("_", "-"),
        "phase": "between",
        "dtype": sent.dtype,
        "bytes": sent.bytes,
      }
      return 0, [], [(made.name, part)]
    if made.opcode == "custom-call" and "tpu_custom_call" in made.attributes:
      return 0, [self._kernel(computation, made)], []
    if made.opcode not in _INLINE:
      return 0, [], []
    return _total(self._fused(name) for name in made.calls)

  def _kernel(self, computation: str, made: hlo.Instruction) -> tuple[Call, float]:
    """A kernel and its FLOPs. Attention is recognized by its name. Its shapes give the FLOPs."""
    name = re.sub(r"\.\d+$", "", made.name)
    matmuls = next((n for kernel, n in _ATTENTION_MATMULS if kernel in name), 0)
    arrays = {i.name: i.arrays for i in self._program.computations[computation]}
    heads = [
      a[0].dims
      for a in map(arrays.get, made.operands)
      if a and len(a[0].dims) in (3, 4) and a[0].dtype in _FLOATS
    ]
    call = Call(made.name, name, made.op_name)
    if "gmm" in name:
      # A grouped matmul [R, K] x [e, K, N], or for the weights' gradient [R, K] x [R, N].
      floats = [a[0] for a in map(arrays.get, made.operands) if a and a[0].dtype in _FLOATS]
      return call, 2 * math.prod(floats[0].dims) * made.arrays[0].dims[-1]
    if not matmuls or len(heads) < 2:
      return call, 0
    results = sum(len(a.dims) >= len(heads[0]) for a in made.arrays)
    if results > 2 and any(kernel in name for kernel in _ATTENTION_DKV):
      matmuls += 1  # fused: the gradient of the queries too
    # Queries [..., N, T, H] and keys [..., K, S, H] are the first arrays of heads.
    (*rows, queries, size), keys = heads[0], heads[1][-2]
    return call, 2 * matmuls * math.prod(rows) * queries * keys * size

  def _fused(self, name: str) -> _Sums:
    """Sums over a computation that is part of an instruction."""
    if name not in self._sums:
      body = self._program.computations.get(name, [])
      flops, kernels, parts = _total(self._inside(name, made) for made in body)
      text = " ".join(made.attributes for made in body if made.opcode == "custom-call")
      # XLA spreads an asynchronous collective over several fusions. One starts it; others, which
      # compute something else, advance or finish it.
      if "AsyncCollectiveStart" in text:
        parts = [(channel, part | {"phase": "start"}) for channel, part in parts]
      elif "AsyncCollectiveDone" in text or name.startswith("async_collective_fusion"):
        parts = [(channel, part | {"phase": "rest"}) for channel, part in parts]
      # An all-reduce of which a device keeps only a slice is a reduce-scatter.
      scatters = any(made.opcode == "dynamic-slice" for made in body)
      if scatters or "all-reduce-scatter" in name:
        parts = [
          (channel, part | {"opcode": "reduce-scatter"} if part["opcode"] == "all-reduce" else part)
          for channel, part in parts
        ]
      self._sums[name] = flops, kernels, parts
    return self._sums[name]


class _HostLink:
  """The link to the host's memory while a computation runs.

  Transfers of a direction take their turns; those of the other one move at the same time. At the
  end of a transfer the program waits if the compute between start and end takes less time.

  Attributes:
    bytes: {TO_HOST: bytes, FROM_HOST: bytes} that moved.
    waited: Cycles that the program waited.
  """

  def __init__(self, rate: float):
    """`rate` is the bandwidth in bytes per cycle, or 0 to wait for nothing."""
    self._rate, self._now = rate, 0.0
    self._free: dict[str, float] = {}  # when a direction has moved all that started
    self._ends: dict[str, float] = {}  # when a transfer that started ends
    self.bytes: dict[str, float] = {}
    self.waited = 0.0

  def compute(self, cycles: float) -> None:
    """Computes for a number of cycles."""
    self._now += cycles

  def move(self, made: hlo.Instruction) -> None:
    """Starts a transfer, or waits for the end of one, if the instruction does so."""
    if moved := _to_or_from_host(made):
      way, size = moved
      self.bytes[way] = self.bytes.get(way, 0.0) + size
      if self._rate:
        begin = max(self._now, self._free.get(way, 0.0))
        self._free[way] = self._ends[made.name] = begin + size / self._rate
    elif made.operands and made.operands[0] in self._ends:
      end = self._ends.pop(made.operands[0])
      self.waited += max(end - self._now, 0.0)
      self._now = max(end, self._now)


def _to_or_from_host(made: hlo.Instruction) -> tuple[str, float] | None:
  """Where an instruction starts to move an array to or from the host's memory: (way, bytes).

  The results of such a start are its operands, the array that it makes, and counters: for example
  an array of all layers in the host's memory, and the part of one layer on the device. What moves
  is the smaller one.
  """
  arrays = [a for a in made.arrays if a.dims]
  if not made.opcode.endswith("-start") or len({a.host for a in arrays}) < 2:
    return None
  target = arrays[0] if made.opcode == "copy-start" else arrays[-1]
  return TO_HOST if target.host else FROM_HOST, min(a.bytes for a in arrays)


def _result_bytes(made: hlo.Instruction) -> float:
  """Bytes of a result. Where a call starts, its type has the operands and a counter as well."""
  if not made.opcode.endswith("-start"):
    return made.bytes
  return next((a.bytes for a in reversed(made.arrays) if a.dims), 0.0)


def _total(sums: Iterable[_Sums]) -> _Sums:
  flops: float = 0
  kernels: list[tuple[Call, float]] = []
  parts: list[_Part] = []
  for f, k, p in sums:
    flops += f
    kernels += k
    parts += p
  return flops, kernels, parts


def _part_of(program: hlo.Program, computation: str, made: hlo.Instruction, opcode: str) -> _Part:
  """The part of a collective that an instruction is."""
  size = sum(a.bytes for a in hlo.moved_arrays(program, computation, made))
  if made.opcode == "reduce-scatter-start":  # the array that it divides
    size = max(size, sum(a.bytes for a in made.arrays[: len(made.operands)]))
  channel = made.attribute("channel_id") or made.name
  return channel, {
    "opcode": opcode,
    "dtype": made.arrays[0].dtype,
    "bytes": size,
    "phase": "start" if made.opcode.endswith("-start") else "whole",
  }


_PHASES = {
  "start": "overlapped",
  "whole": "exposed",
  "between": "between",
}  # a "rest" is counted at its start


def _add_collective(cost: Cost, parts: Sequence[dict[str, Any]]) -> None:
  """Adds one collective, which may consist of several parts, to a cost. Counts each part once."""
  for phase in _PHASES:
    for part in parts:
      if part["phase"] == phase:
        key = (part["opcode"], part["dtype"], _PHASES[phase])
        entry = cost.collectives.setdefault(key, [0, 0.0])
        entry[0] += 1
        entry[1] += part["bytes"]
