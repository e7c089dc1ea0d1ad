"""What a step takes on a GPU at best: every instruction at the rate of what limits it.

XLA writes no estimates into a GPU's program, and the matmuls of one that is compiled without a GPU are
not tuned. So this is a roofline: matmuls and attention take their FLOPs at the peak rate or their bytes
at the memory's, whichever is longer, all else its bytes, collectives their bytes over the links. A
collective that the program starts early is hidden by what it schedules before its end.
"""

import dataclasses
import math
import re

from jaxgpt.plan import hlo
from jaxgpt.plan.cost import COLLECTIVES

NVLINK, NETWORK = "NVLink", "network"
# Matmuls of a call of cuDNN's attention: the backward pass computes the weights anew.
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
    seconds: {'matmul', 'other', 'kernels', 'exposed', 'unhidden'}: waiting for collectives that
      nothing can hide, and for the rest of those that something is scheduled beside.
    flops: of the matmuls, as the program computes them.
    kernel_flops: of attention; what is above the diagonal left out where the kernel skips it.
    traffic: bytes of memory that are read and written by what is neither matmul nor kernel.
    kernels: {name: calls}.
    collectives: {(opcode, dtype, link, 'exposed' or 'overlapped'): [calls, bytes]}; the bytes are
      those that a GPU sends.
  """

  seconds: dict = dataclasses.field(
    default_factory=lambda: dict.fromkeys(
      ("matmul", "other", "kernels", "exposed", "unhidden"), 0.0
    )
  )
  flops: float = 0.0
  kernel_flops: float = 0.0
  traffic: float = 0.0
  kernels: dict = dataclasses.field(default_factory=dict)
  collectives: dict = dataclasses.field(default_factory=dict)

  @property
  def total(self):
    return sum(self.seconds.values())

  def add(self, other, times=1):
    """Adds another so many times."""
    for key, value in other.seconds.items():
      self.seconds[key] += value * times
    self.flops += other.flops * times
    self.kernel_flops += other.kernel_flops * times
    self.traffic += other.traffic * times
    for key, calls in other.kernels.items():
      self.kernels[key] = self.kernels.get(key, 0) + calls * times
    for key, (calls, size) in other.collectives.items():
      entry = self.collectives.setdefault(key, [0, 0.0])
      entry[0] += calls * times
      entry[1] += size * times

  def bytes(self, phase=None, link=None):
    """Bytes of the collectives of a phase or link, or of all."""
    return sum(
      size
      for (_, _, on, when), (_, size) in self.collectives.items()
      if phase in (None, when) and link in (None, on)
    )


def of_program(program, chip, hosts):
  """The `Roofline` of a step.

  Args:
    program: an `hlo.Program`, as it is scheduled.
    chip: a `chips.Chip`, of a GPU.
    hosts: of each partition of the program in turn, the number of its host.
  """
  return _Walk(program, chip, hosts).of(program.entry)


class _Walk:
  """Rooflines of computations, each worked out once."""

  def __init__(self, program, chip, hosts):
    self._program, self._chip, self._hosts = program, chip, hosts
    self._known = {}

  def of(self, name):
    """The roofline of one run of a scheduled computation: the entry, or a loop's body."""
    if name in self._known:
      return self._known[name]
    out, links_free, ends = Roofline(), 0.0, {}
    types = {made.name: made for made in self._program.computations[name]}
    for made in self._program.computations[name]:
      base = re.sub(r"-(start|done)$", "", made.opcode)
      if made.opcode.endswith("-done"):
        if base in COLLECTIVES:
          out.seconds["unhidden"] += max(ends.pop(made.operands[0], 0.0) - out.total, 0.0)
      elif base in COLLECTIVES:
        waits = made.opcode == base
        seconds = self._collective(out, made, base, waits)
        links_free = max(links_free, out.total) + seconds
        if waits:
          out.seconds["exposed"] += links_free - out.total
        else:
          ends[made.name] = links_free
      elif base == "while":
        trips = hlo.trip_count(self._program, name, made)
        out.add(self.of(made.attribute("body").lstrip("%")), trips)
      elif base == "call":
        out.add(self.of(made.calls[0]))
      elif (
        base == "conditional"
      ):  # a step that is not finite leaves the state alone: the other branch
        out.add(max(map(self.of, made.calls), key=lambda branch: branch.total))
      else:
        self._compute(out, name, made, types)
    self._known[name] = out
    return out

  def _compute(self, out, computation, made, types):
    """Adds an instruction that is no collective and no control flow."""
    traffic = self._traffic(made, types)
    seconds = traffic / self._chip.hbm_bandwidth
    kernel = attention_kernel(made)
    if kernel:
      name, flops = kernel
      out.kernels[name] = out.kernels.get(name, 0) + 1
      out.kernel_flops += flops
      out.seconds["kernels"] += max(flops / self._chip.clocked_flops, seconds)
      return
    flops = self._flops(computation, made)
    if flops:
      out.flops += flops
      out.seconds["matmul"] += max(flops / self._chip.clocked_flops, seconds)
    else:
      out.traffic += traffic
      out.seconds["other"] += seconds

  def _flops(self, computation, made):
    """FLOPs of an instruction's matmuls, also of those that it is fused from."""
    if made.opcode in ("dot", "convolution"):
      return hlo.matmul_flops(self._program, computation, made)
    if made.opcode == "custom-call":
      return _library_matmul(made, self._program.computations[computation])
    if not made.opcode.startswith("fusion"):
      return 0
    return sum(
      self._flops(name, inner)
      for name in made.calls
      for inner in self._program.computations.get(name, ())
    )

  def _traffic(self, made, types):
    """Bytes of memory that an instruction reads and writes."""
    if made.opcode in _NO_TRAFFIC:
      return 0
    operands = [types[name].bytes if name in types else 0 for name in made.operands]
    body = self._program.computations.get(made.calls[0], ()) if made.calls else ()
    if not made.opcode.startswith("fusion") or not body:
      if made.opcode == "dynamic-slice":
        return 2 * made.bytes
      if made.opcode == "dynamic-update-slice":
        return 2 * operands[1]
      return sum(operands) + made.bytes
    inner = {one.name: one for one in body}
    read = sum(
      _read(one, body, operands[int(one.operands[0])]) for one in body if one.opcode == "parameter"
    )
    root = next(one for one in body if one.is_root)
    roots = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return read + sum(_written(one, inner) for one in roots)

  def _collective(self, out, made, opcode, waits):
    """Counts a collective and returns its seconds."""
    results = made.arrays
    if not waits and len(results) >= 2 * len(made.operands):  # (operands, results)
      results = results[len(made.operands) : 2 * len(made.operands)]
    size, groups = sum(a.bytes for a in results), hlo.groups(made)
    members = len(self._hosts) if groups is None else groups.shape[1]
    share = (members - 1) / members
    sent = {
      "all-gather": size * share,
      "all-reduce": 2 * size * share,
      "reduce-scatter": size * (members - 1),
      "all-to-all": size * share,
      "ragged-all-to-all": size * share,
    }.get(opcode, size)
    link, rate = self._link(groups)
    key = (opcode, results[0].dtype, link, "exposed" if waits else "overlapped")
    entry = out.collectives.setdefault(key, [0, 0.0])
    entry[0] += 1
    entry[1] += sent
    return sent / rate

  def _link(self, groups):
    """(what a collective goes over, bytes a second of a GPU): members of a host share its cards."""
    chip = self._chip
    rows = [range(len(self._hosts))] if groups is None else groups
    there = [[self._hosts[i] for i in row] for row in rows]
    if all(len(set(row)) == 1 for row in there):
      return NVLINK, chip.ici_bandwidth
    fewest = min(min(map(row.count, row)) for row in there if len(set(row)) > 1)
    return NETWORK, min(chip.ici_bandwidth, fewest * chip.dcn_bandwidth)


def _users(made, body):
  """What reads a parameter of a fused computation, seen through bitcasts."""
  out = []
  for one in body:
    if made.name in one.operands and one.name != made.name:
      out += (
        _users(one, body) if one.opcode == "bitcast" else [(one, one.operands.index(made.name))]
      )
  return out


def _read(parameter, body, size):
  """Bytes that a fusion reads of an operand: slices of it, nothing of what it writes over, or all."""
  users = _users(parameter, body)
  if users and all(
    one.opcode in ("dynamic-slice", "slice", "gather") and at == 0 for one, at in users
  ):
    return min(size, sum(one.bytes for one, _ in users))
  if users and all(one.opcode == "dynamic-update-slice" and at == 0 for one, at in users):
    return 0
  return size


def _written(made, inner):
  """Bytes that a fusion writes for a result: all of it, or the slice that is new."""
  while made.opcode == "bitcast" and made.operands[0] in inner:
    made = inner[made.operands[0]]
  if made.opcode == "dynamic-update-slice" and made.operands[1] in inner:
    return inner[made.operands[1]].bytes
  return made.bytes


def attention_kernel(made):
  """(name, FLOPs) of a call of cuDNN's flash attention, or None."""
  target = re.search(r'custom_call_target="__cudnn\$(fmha)\w*?(Backward)?"', made.attributes)
  if made.opcode != "custom-call" or not target:
    return None
  name, matmuls = _ATTENTION[target[1] + (target[2] or "")]
  layouts = made.attribute("operand_layout_constraints") or ""
  found = re.search(r"operand_layout_constraints=\{(.*?\})\}", made.attributes)
  queries, keys = hlo.arrays(found[1] if found else layouts)[:2]  # [B, T, N, H] and [B, S, K, H]
  seen = 0.5 if '"mask_type": "CAUSAL"' in made.attributes else 1
  return name, 2 * matmuls * math.prod(queries.dims) * keys.dims[1] * seen


def _library_matmul(made, body):
  """FLOPs of a call of cuBLAS, or 0."""
  if "__cublas$" not in made.attributes:
    return 0
  found = re.search(r'"lhs_contracting_dimensions": ?\[([^\]]*)\]', made.attributes)
  lhs = next(one for one in body if one.name == made.operands[0]).arrays[0].dims
  contracted = [int(n) for n in re.findall(r"\d+", found[1])] if found else []
  return 2 * math.prod(made.arrays[0].dims) * math.prod(lhs[d] for d in contracted)
