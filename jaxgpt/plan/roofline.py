"""Roofline of a GPU program: every instruction at the rate of its bottleneck.

XLA does not write estimates into a GPU program, and the matmuls of a program that was compiled
without a GPU are not tuned. So this is a lower bound on the time:

  * Matmuls and attention take FLOPs / peak rate or bytes / memory bandwidth, whichever is longer.
    The peak rate is that of bfloat16, or twice that if both operands have eight bits.
  * Other instructions take bytes / memory bandwidth.
  * Collectives take bytes / link bandwidth. One that starts early is hidden by the instructions
    that are scheduled before its end:

      all-gather-start ─┐  links busy ─────────────────────►│
      matmul            │  ████████████████                 │
      all-gather-done ──┘                  └── unhidden ────┘
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from jaxgpt.parallel.chips import Chip
from jaxgpt.plan import hlo
from jaxgpt.plan.cost import COLLECTIVES

NVLINK, NETWORK = "NVLink", "network"
# Rate of matmuls of eight-bit numbers, as a multiple of bfloat16's, by the data sheets of A100
# (int8), H100, H200 and B200.
_EIGHT_BIT = 2
# Matmuls per call of cuDNN's attention. The backward pass computes the weights again.
_ATTENTION = {
  "fmhaBackward": ("cudnn_attention_backward", 5),
  "fmha": ("cudnn_attention_forward", 2),
}
_NO_TRAFFIC = (
  "parameter",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "constant",
  "partition-id",
  "replica-id",
  "after-all",
  "opt-barrier",
  "optimization-barrier",
  "iota",
)


@dataclasses.dataclass
class Roofline:
  """Sums over a step on one GPU.

  Attributes:
    seconds: {'matmul', 'other', 'kernels', 'exposed', 'unhidden'}. 'exposed' is time spent in
      synchronous collectives, 'unhidden' the wait at the end of asynchronous ones.
    flops: FLOPs of the matmuls in the program.
    kernel_flops: FLOPs of attention, without those above the diagonal if the kernel skips them.
    traffic: Bytes of memory read and written by instructions other than matmuls and kernels.
    kernels: {name: calls}.
    collectives: {(opcode, dtype, link, 'exposed' or 'overlapped'): [calls, bytes sent per GPU]}.
    assumed_trips: As in `cost.Cost`.
  """

  seconds: dict[str, float] = dataclasses.field(
    default_factory=lambda: dict.fromkeys(
      ("matmul", "other", "kernels", "exposed", "unhidden"), 0.0
    )
  )
  flops: float = 0.0
  kernel_flops: float = 0.0
  traffic: float = 0.0
  kernels: dict[str, int] = dataclasses.field(default_factory=dict)
  collectives: dict[tuple[str, str, str, str], list[float]] = dataclasses.field(
    default_factory=dict
  )
  assumed_trips: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def total(self) -> float:
    """Seconds of the step."""
    return sum(self.seconds.values())

  def add(self, other: "Roofline", times: int = 1) -> None:
    """Adds another roofline, multiplied by `times`."""
    for key, value in other.seconds.items():
      self.seconds[key] += value * times
    self.flops += other.flops * times
    self.kernel_flops += other.kernel_flops * times
    self.traffic += other.traffic * times
    self.assumed_trips |= other.assumed_trips
    for name, calls in other.kernels.items():
      self.kernels[name] = self.kernels.get(name, 0) + calls * times
    for kind, (count, size) in other.collectives.items():
      entry = self.collectives.setdefault(kind, [0, 0.0])
      entry[0] += count * times
      entry[1] += size * times

  def bytes(self, phase: str | None = None, link: str | None = None) -> float:
    """Bytes of the collectives of a phase and link. None: all of them."""
    return sum(
      size
      for (_, _, on, when), (_, size) in self.collectives.items()
      if phase in (None, when) and link in (None, on)
    )


def of_program(program: hlo.Program, chip: Chip, hosts: Sequence[int]) -> Roofline:
  """The roofline of one step of a program.

  Args:
    program: A scheduled program.
    chip: The GPU.
    hosts: For each partition of the program, the number of its host.
  """
  return _Walk(program, chip, hosts).of(program.entry)


class _Walk:
  """Computes the roofline of each computation of a program once."""

  def __init__(self, program: hlo.Program, chip: Chip, hosts: Sequence[int]):
    self._program, self._chip, self._hosts = program, chip, hosts
    self._known: dict[str, Roofline] = {}

  def of(self, name: str) -> Roofline:
    """The roofline of one run of a scheduled computation: the entry, or the body of a loop."""
    if name in self._known:
      return self._known[name]
    out = Roofline()
    links_free = 0.0  # when the links have sent all collectives so far
    ends: dict[str, float] = {}  # when each asynchronous collective has arrived
    types = {made.name: made for made in self._program.computations[name]}
    for made in self._program.computations[name]:
      base = re.sub(r"-(start|done)$", "", made.opcode)
      if made.opcode.endswith("-done"):
        if base in COLLECTIVES:
          out.seconds["unhidden"] += max(ends.pop(made.operands[0], 0.0) - out.total, 0.0)
      elif base in COLLECTIVES:
        waits = made.opcode == base
        seconds = self._collective(out, name, made, base)
        links_free = max(links_free, out.total) + seconds
        if waits:
          out.seconds["exposed"] += links_free - out.total
        else:
          ends[made.name] = links_free
      elif base == "while":
        trips = hlo.trips(self._program, name, made)
        out.add(self.of(made.body), trips.runs)
        if not trips.known:
          out.assumed_trips[made.name] = trips.runs
      elif base == "call":
        out.add(self.of(made.calls[0]))
      elif base == "conditional":  # the longer branch: the other one skips a non-finite update
        out.add(max(map(self.of, made.calls), key=lambda branch: branch.total))
      else:
        self._compute(out, name, made, types)
    self._known[name] = out
    return out

  def _compute(
    self,
    out: Roofline,
    computation: str,
    made: hlo.Instruction,
    types: Mapping[str, hlo.Instruction],
  ) -> None:
    """Adds an instruction other than a collective or control flow."""
    traffic = self._traffic(made, types)
    seconds = traffic / self._chip.hbm_bandwidth
    kernel = attention_kernel(made)
    if kernel:
      name, flops = kernel
      out.kernels[name] = out.kernels.get(name, 0) + 1
      out.kernel_flops += flops
      out.seconds["kernels"] += max(flops / self._chip.clocked_flops, seconds)
      return
    flops, as_bfloat16 = self._flops(computation, made)
    if flops:
      out.flops += flops
      out.seconds["matmul"] += max(as_bfloat16 / self._chip.clocked_flops, seconds)
    else:
      out.traffic += traffic
      out.seconds["other"] += seconds

  def _flops(self, computation: str, made: hlo.Instruction) -> tuple[float, float]:
    """FLOPs of the matmuls in an instruction or in the computations it is fused from.

    Returns:
      (FLOPs, the bfloat16 FLOPs that take as long at the peak).
    """
    body = self._program.computations[computation]
    if made.opcode in ("dot", "convolution"):
      flops = hlo.matmul_flops(self._program, computation, made)
    elif made.opcode == "custom-call":
      flops = _library_matmul(made, body)
    elif made.opcode.startswith("fusion"):
      inner = [
        self._flops(name, one)
        for name in made.calls
        for one in self._program.computations.get(name, ())
      ]
      return sum(flops for flops, _ in inner), sum(as_bfloat16 for _, as_bfloat16 in inner)
    else:
      return 0, 0
    return flops, flops / (_EIGHT_BIT if flops and _has_eight_bits(made, body) else 1)

  def _traffic(self, made: hlo.Instruction, types: Mapping[str, hlo.Instruction]) -> float:
    """Bytes of memory that an instruction reads and writes."""
    if made.opcode in _NO_TRAFFIC:
      return 0
    operands = [types[name].bytes if name in types else 0 for name in made.operands]
    body = self._program.computations.get(made.calls[0], []) if made.calls else []
    if not made.opcode.startswith("fusion") or not body:
      if made.opcode == "dynamic-slice":
        return 2 * made.bytes
      if made.opcode == "dynamic-update-slice":
        return 2 * operands[1]
      return sum(operands) + made.bytes
    inner = {one.name: one for one in body}
    # A fusion keeps its intermediate results in registers. It reads its parameters and writes its
    # root, or the elements of a tuple.
    read = sum(
      _read(one, body, operands[int(one.operands[0])]) for one in body if one.opcode == "parameter"
    )
    root = next(one for one in body if one.is_root)
    roots = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return read + sum(_written(one, inner) for one in roots)

  def _collective(
    self, out: Roofline, computation: str, made: hlo.Instruction, opcode: str
  ) -> float:
    """Counts a collective and returns its seconds."""
    results = hlo.moved_arrays(self._program, computation, made)
    size, groups = sum(a.bytes for a in results), hlo.groups(made)
    members = len(self._hosts) if groups is None else groups.shape[1]
    # Bytes that one of N members sends in a ring. `size` is that of the result.
    share = (members - 1) / members
    sent = {
      "all-gather": size * share,
      "all-reduce": 2 * size * share,
      "reduce-scatter": size * (members - 1),
      "all-to-all": size * share,
      "ragged-all-to-all": size * share,
    }.get(opcode, size)
    link, rate = self._link(groups)
    key = (opcode, results[0].dtype, link, "exposed" if made.opcode == opcode else "overlapped")
    entry = out.collectives.setdefault(key, [0, 0.0])
    entry[0] += 1
    entry[1] += sent
    return sent / rate

  def _link(self, groups: np.ndarray | None) -> tuple[str, float]:
    """(link of a collective, bytes/s per GPU). Members on the same host use all their cards."""
    chip = self._chip
    members = [range(len(self._hosts))] if groups is None else groups
    hosts = [[self._hosts[i] for i in group] for group in members]
    if all(len(set(group)) == 1 for group in hosts):
      return NVLINK, chip.ici_bandwidth
    fewest = min(min(map(group.count, group)) for group in hosts if len(set(group)) > 1)
    return NETWORK, min(chip.ici_bandwidth, fewest * chip.dcn_bandwidth)


def _users(
  made: hlo.Instruction, body: Sequence[hlo.Instruction]
) -> list[tuple[hlo.Instruction, int]]:
  """(instruction, operand index) of all reads of a fusion's parameter, looking through bitcasts."""
  out: list[tuple[hlo.Instruction, int]] = []
  for one in body:
    if made.name in one.operands and one.name != made.name:
      out += (
        _users(one, body) if one.opcode == "bitcast" else [(one, one.operands.index(made.name))]
      )
  return out


def _read(parameter: hlo.Instruction, body: Sequence[hlo.Instruction], size: float) -> float:
  """Bytes that a fusion reads from an operand.

  These are only the slices that it takes, nothing if it only writes into the operand, otherwise
  all `size` bytes.
  """
  users = _users(parameter, body)
  if users and all(
    one.opcode in ("dynamic-slice", "slice", "gather") and at == 0 for one, at in users
  ):
    return min(size, sum(one.bytes for one, _ in users))
  if users and all(one.opcode == "dynamic-update-slice" and at == 0 for one, at in users):
    return 0
  return size


def _written(made: hlo.Instruction, inner: Mapping[str, hlo.Instruction]) -> float:
  """Bytes that a fusion writes for a result: all of it, or the slice that it updates."""
  while made.opcode == "bitcast" and made.operands[0] in inner:
    made = inner[made.operands[0]]
  if made.opcode == "dynamic-update-slice" and made.operands[1] in inner:
    return inner[made.operands[1]].bytes
  return made.bytes


def attention_kernel(made: hlo.Instruction) -> tuple[str, float] | None:
  """(name, FLOPs) of a call of cuDNN's flash attention, or None for other instructions."""
  target = re.search(r'custom_call_target="__cudnn\$(fmha)\w*?(Backward)?"', made.attributes)
  if made.opcode != "custom-call" or not target:
    return None
  name, matmuls = _ATTENTION[target[1] + (target[2] or "")]
  layouts = made.attribute("operand_layout_constraints") or ""
  found = re.search(r"operand_layout_constraints=\{(.*?\})\}", made.attributes)
  queries, keys = hlo.arrays(found[1] if found else layouts)[:2]  # [B, T, N, H] and [B, S, K, H]
  seen = 0.5 if '"mask_type": "CAUSAL"' in made.attributes else 1
  return name, 2 * matmuls * math.prod(queries.dims) * keys.dims[1] * seen


def _has_eight_bits(made: hlo.Instruction, body: Sequence[hlo.Instruction]) -> bool:
  """Whether both operands of a matmul are of numbers of at most eight bits."""
  types = {one.name: one.arrays[0].dtype for one in body if one.arrays}
  return all(hlo.DTYPE_BYTES[types[name]] <= 1 for name in made.operands[:2])


def _library_matmul(made: hlo.Instruction, body: Sequence[hlo.Instruction]) -> float:
  """FLOPs of a call of cuBLAS, or 0 for other instructions."""
  if "__cublas$" not in made.attributes:
    return 0
  found = re.search(r'"lhs_contracting_dimensions": ?\[([^\]]*)\]', made.attributes)
  lhs = next(one for one in body if one.name == made.operands[0]).arrays[0].dims
  contracted = [int(n) for n in re.findall(r"\d+", found[1])] if found else []
  return 2 * math.prod(made.arrays[0].dims) * math.prod(lhs[d] for d in contracted)
