"""Reads the text of a compiled program: instructions, loops and how often they run, matmuls."""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

DTYPE_BYTES = {
  "pred": 1,
  "s4": 0.5,
  "u4": 0.5,
  "s8": 1,
  "u8": 1,
  "f8e4m3fn": 1,
  "f8e5m2": 1,
  "bf16": 2,
  "f16": 2,
  "s16": 2,
  "u16": 2,
  "f32": 4,
  "s32": 4,
  "u32": 4,
  "f64": 8,
  "s64": 8,
  "u64": 8,
  "c64": 8,
}

_ARRAY = re.compile(r"\b(" + "|".join(DTYPE_BYTES) + r")\[([\d,]*)\]")
_HEAD = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\{$")
_LINE = re.compile(r"  (ROOT )?%?([^\s=]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_UNKNOWN_TRIPS = 1  # where a loop does not say


class Array(NamedTuple):
  """An array's type."""

  dtype: str
  dims: tuple

  @property
  def bytes(self):
    return math.prod(self.dims) * DTYPE_BYTES[self.dtype]


class Instruction(NamedTuple):
  """A line of a computation.

  Attributes:
    name: without the percent sign.
    arrays: the `Array`s of its result.
    opcode: such as 'fusion'.
    operands: names.
    attributes: what follows the operands, as text.
    is_root: whether it is the computation's result.
  """

  name: str
  arrays: tuple
  opcode: str
  operands: tuple
  attributes: str
  is_root: bool

  @property
  def bytes(self):
    return sum(a.bytes for a in self.arrays)

  def attribute(self, key):
    """The text after `key=`, up to the next comma, or None; braces are kept together."""
    found = re.search(rf"(?:^|[ ,]){key}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
    return found and found[1]

  @property
  def calls(self):
    """Names of the computations that it is made of."""
    names = [
      self.attribute(key) for key in ("calls", "to_apply", "true_computation", "false_computation")
    ]
    names += (self.attribute("branch_computations") or "").strip("{}").split(",")
    return [n.strip().lstrip("%") for n in names if n]

  @property
  def op_name(self):
    """Where it comes from in the model, as JAX names it: 'jit(train_step)/…/dot_general'."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return found[1].replace("\\'", "'") if found else ""

  @property
  def cycles(self):
    """What the TPU compiler estimates it takes, or 0 where it says nothing."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
    return int(found[1]) if found else 0


class Program(NamedTuple):
  """A compiled program.

  Attributes:
    computations: {name: [`Instruction`, …]} in the order of the schedule.
    entry: name of the first one.
  """

  computations: dict
  entry: str

  def find(self, computation, name):
    """An instruction by name, or None."""
    return next((i for i in self.computations[computation] if i.name == name), None)


def arrays(text):
  """The `Array`s of a type, a tuple's in order."""
  return tuple(
    Array(dtype, tuple(int(n) for n in dims.split(",") if n))
    for dtype, dims in _ARRAY.findall(text)
  )


def parse(text):
  """A `Program` from `compiled.as_text()`."""
  computations, entry, current = {}, None, None
  for line in _whole_lines(text):
    if line.startswith("  ") and current is not None:
      found = _LINE.match(line)
      if found:
        current.append(_instruction(found[2], found[3], bool(found[1])))
    elif line.endswith("{"):
      found = _HEAD.match(line)
      if found:
        current = computations.setdefault(found[2], [])
        entry = found[2] if found[1] else entry
    elif line == "}":
      current = None
  return Program(computations, entry)


def _whole_lines(text):
  """Lines; those that a kernel's notes break in two are joined again."""
  whole = []
  for line in text.splitlines():
    if whole and whole[-1].startswith("  ") and line and line != "}" and line[:2] != "  ":
      whole[-1] += line
    else:
      whole.append(line)
  return whole


def _instruction(name, rest, is_root):
  type_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  result, rest = rest[:type_end], rest[type_end:].lstrip()
  open_at = rest.index("(")
  close_at = _closing(rest, open_at)
  operands = rest[open_at + 1 : close_at]
  opcode = rest[:open_at]
  names = tuple(_NAME.findall(operands))
  if opcode in ("constant", "parameter"):
    names = (operands,)
  return Instruction(
    name, arrays(result), opcode, names, rest[close_at + 1 :].lstrip(", "), is_root
  )


def _closing(text, at):
  """Index of the parenthesis that closes the one at `at`."""
  depth = 0
  for i in range(at, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  raise ValueError(f"unbalanced parentheses: {text[:80]}")


def trip_count(program, computation, loop):
  """How often the body of a `while` runs.

  From XLA's own note where there is one, or else from the comparison of a counter with a constant,
  the counter's first value and its step; 1 where neither is found.

  Args:
    program: a `Program`.
    computation: name of the computation that the loop stands in.
    loop: the `Instruction`.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known[1])
  condition = loop.attribute("condition").lstrip("%")
  compare, values = _comparison(program, condition)
  if compare is None:
    return _UNKNOWN_TRIPS
  start = program.find(computation, loop.operands[0])
  first = lambda i: _constant(program, computation, start.operands[i]) if start else None
  direction = compare.attribute("direction")
  ends = [v if kind == "constant" else first(v) for kind, v in values]
  counters = [v for kind, v in values if kind == "element"]
  if not counters or ends[1] is None:
    return _UNKNOWN_TRIPS
  begin = ends[0] if ends[0] is not None else 0
  step = _step(program, loop.attribute("body").lstrip("%"), counters[0])
  length = {
    "LT": ends[1] - begin,
    "LE": ends[1] - begin + 1,
    "GT": begin - ends[1],
    "GE": begin - ends[1] + 1,
    "NE": abs(ends[1] - begin),
  }.get(direction, 0)
  return max(-(-length // abs(step)), 0)


def _comparison(program, condition):
  """The comparison that ends a loop: (instruction, [('constant', value) or ('element', i)])."""
  root = next(i for i in program.computations[condition] if i.is_root)
  inner = condition
  bind = {}
  if root.opcode == "fusion":
    inner = root.calls[0]
    bind = dict(enumerate(root.operands))
    root = next(i for i in program.computations[inner] if i.is_root)
  if root.opcode != "compare":
    return None, []

  def resolve(name, where):
    made = program.find(where, name)
    if made is None:
      return ("element", -1)
    if made.opcode == "constant":
      return ("constant", int(made.operands[0]))
    if made.opcode == "get-tuple-element":
      return ("element", int(made.attribute("index")))
    if made.opcode == "parameter" and where == inner and bind:
      return resolve(bind[int(made.operands[0])], condition)
    if made.opcode in ("copy", "bitcast", "convert"):
      return resolve(made.operands[0], where)
    return ("element", -1)

  values = [resolve(name, inner) for name in root.operands]
  if ("element", -1) in values or all(kind == "constant" for kind, _ in values):
    return None, []
  return root, values


def _constant(program, computation, name):
  """The integer that an instruction always has, or None."""
  made = program.find(computation, name)
  while made is not None and made.opcode in ("copy", "bitcast", "convert"):
    made = program.find(computation, made.operands[0])
  if made is None or made.opcode != "constant":
    return None
  try:
    return int(made.operands[0])
  except ValueError:
    return None


def _step(program, body, element):
  """What an iteration adds to an element of the loop's state; 1 where that isn't plain."""
  root = next(i for i in program.computations[body] if i.is_root)
  made = program.find(body, root.operands[element]) if root.opcode == "tuple" else None
  if made is None or made.opcode != "add":
    return 1
  constants = [_constant(program, body, name) for name in made.operands]
  return next((c for c in constants if c), 1)


def matmul_flops(program, computation, made):
  """FLOPs of a `dot` or `convolution` (which a TPU's dots become): two a multiply-add."""
  types = {i.name: i.arrays for i in program.computations[computation]}
  lhs, rhs = (types.get(name) for name in made.operands[:2])
  if not lhs or not rhs:
    return 0
  out, lhs, rhs = made.arrays[0].dims, lhs[0].dims, rhs[0].dims
  if made.opcode == "dot":
    contracted = re.findall(r"\d+", made.attribute("lhs_contracting_dims") or "")
    return 2 * math.prod(out) * math.prod(lhs[int(d)] for d in contracted)
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", made.attributes)
  of_lhs, of_rhs, of_out = labels.groups()
  window = re.search(r"window=\{([^}]*)\}", made.attributes)
  window = dict(part.split("=") for part in window[1].split()) if window else {}
  flops = 2 * out[of_out.index("b")] * out[of_out.index("f")] * rhs[of_rhs.index("i")]
  for d in range(len(of_lhs) - 2):
    at = lambda key, default, d=d: window[key].split("x")[d] if key in window else default
    flops *= _hits(
      lhs[of_lhs.index(str(d))],
      out[of_out.index(str(d))],
      int(at("size", 1)),
      int(at("pad", "0_0").split("_")[0]),
      int(at("stride", 1)),
      int(at("lhs_dilate", 1)),
      int(at("rhs_dilate", 1)),
    )
  return flops


@functools.cache
def _hits(size_in, size_out, size, low_pad, stride, dilate_in, dilate_window):
  """Pairs (output, place in the window) that meet an input, and neither padding nor a hole."""
  if size == 1 and low_pad == 0 and dilate_in == 1:
    return size_out
  at = np.arange(size_out)[:, None] * stride + np.arange(size)[None] * dilate_window - low_pad
  return int(((at % dilate_in == 0) & (at >= 0) & (at // dilate_in < size_in)).sum())


def groups(made):
  """Which partitions a collective exchanges between: an array [groups, members], or None.

  From any of the forms in which XLA writes them: lists, a permuted range, axes of a mesh; of a
  permutation the pairs.

  Args:
    made: the `Instruction`.
  """
  text = made.attributes
  pairs = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", text)
  if pairs:
    rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d, ]+)\}", pairs[1])]
    return np.array(rows) if len({len(row) for row in rows}) == 1 else None
  ranges = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
  if ranges:
    shape, dims, order = (
      [int(n) for n in part.split(",")] if part else None for part in ranges.groups()
    )
    out = np.arange(math.prod(dims)).reshape(dims)
    return (out.transpose(order) if order else out).reshape(shape)
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](, device_ids=\S*)? \{([^}]*)\}", text)
  return _mesh_groups(mesh[1], mesh[3]) if mesh and not mesh[2] else None


def _mesh_groups(mesh, axes):
  """`groups` of "'a'=2,'b'=4" and "'a','b':(1)2", where part of an axis is (what is before it)size."""
  sizes = {name: int(n) for name, n in re.findall(r"'?([\w.]+)'?=(\d+)", mesh)}
  wanted = {
    name: (int(before or 1), int(size) if size else sizes[name])
    for name, before, size in re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?(?:,|$)", axes)
  }
  dims, inside = [], []
  for name, size in sizes.items():
    before, part = wanted.get(name, (1, 1))
    inside.append(len(dims) + 1)
    dims += [before, part, size // before // part]
  order = [d for d in range(len(dims)) if d not in inside] + inside
  return (
    np.arange(math.prod(dims))
    .reshape(dims)
    .transpose(order)
    .reshape(-1, math.prod(dims[d] for d in inside))
  )
