"""Parser for the text of a compiled program (HLO): instructions, trip counts of loops, matmuls.

The text comes from `executable.as_text()`. A program is a set of computations, one of which is the
entry. Each line of a computation is an instruction:

    %body (state: (s32[], f32[4])) -> (s32[], f32[4]) {                computation
      ROOT %y.1 = f32[4]{0} fusion(%x, %w), kind=kLoop, calls=%fused   instruction
            |     |         |      |        |
            name  result    opcode operands attributes
    }
"""

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

_ARRAY = re.compile(r"\b(" + "|".join(DTYPE_BYTES) + r")\[([\d,]*)\](\{[^}]*\})?")
_HOST = "S(5)"  # in a layout: XLA's number of the host's memory
_HEAD = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\{$")
_LINE = re.compile(r"  (ROOT )?%?([^\s=]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_NO_ESTIMATE = 2**63 - 1  # the cycles that libtpu writes where its cost model has no figure


class Array(NamedTuple):
  """Type of an array.

  Attributes:
    dtype: As XLA writes it.
    dims: Its dimensions.
    host: Whether it is in the host's memory.
  """

  dtype: str
  dims: tuple[int, ...]
  host: bool = False

  @property
  def bytes(self) -> float:
    """Size in bytes."""
    return math.prod(self.dims) * DTYPE_BYTES[self.dtype]


class Instruction(NamedTuple):
  """An instruction of a computation.

  Attributes:
    name: Name without the percent sign.
    arrays: Types of its result, several for a tuple.
    opcode: Such as 'fusion'.
    operands: Names of its operands. For a constant or parameter, the text in parentheses.
    attributes: The text after the operands.
    is_root: Whether it is the computation's result.
  """

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  @property
  def bytes(self) -> float:
    """Size of its result in bytes."""
    return sum(a.bytes for a in self.arrays)

  def attribute(self, key: str) -> str | None:
    """The text after `key=` up to the next comma or, if it starts with one, the closing brace."""
    found = re.search(rf"(?:^|[ ,]){key}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
    return found and found[1]

  @property
  def body(self) -> str:
    """Name of the computation that a `while` loop repeats."""
    return (self.attribute("body") or "").lstrip("%")

  @property
  def calls(self) -> list[str]:
    """Names of the computations that it calls, such as those of a fusion or of branches."""
    names = [
      self.attribute(key) for key in ("calls", "to_apply", "true_computation", "false_computation")
    ]
    names += (self.attribute("branch_computations") or "").strip("{}").split(",")
    return [n.strip().lstrip("%") for n in names if n]

  @property
  def op_name(self) -> str:
    """Its origin in the model, as JAX names it: 'jit(train_step)/…/dot_general'."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return found[1].replace("\\'", "'") if found else ""

  @property
  def cycles(self) -> int:
    """The TPU compiler's estimate of cycles, or 0 without an estimate."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
    return int(found[1]) if found and int(found[1]) != _NO_ESTIMATE else 0

  @property
  def unestimated(self) -> str:
    """Its kind if it takes time that the TPU compiler does not estimate, or ''.

    These are work that is offloaded to the SparseCore, sorts, and instructions whose estimate is
    the largest integer. Custom kernels and collectives are counted elsewhere.
    """
    if self.opcode in ("call-start", "async-start") and '"sparsecore"' in self.attributes:
      return f"{self.op_name.split('/')[-1] or self.opcode} on the SparseCore"
    if self.opcode == "sort" or f'"estimated_cycles":"{_NO_ESTIMATE}"' in self.attributes:
      return self.op_name.split("/")[-1] or self.opcode
    return ""


class Program(NamedTuple):
  """A compiled program.

  Attributes:
    computations: {name: instructions in the order of the schedule}.
    entry: Name of the computation that runs first.
  """

  computations: dict[str, list[Instruction]]
  entry: str

  def find(self, computation: str, name: str) -> Instruction | None:
    """An instruction of a computation by name, or None."""
    return next((i for i in self.computations[computation] if i.name == name), None)


def arrays(text: str) -> tuple[Array, ...]:
  """Parses a type, such as 'bf16[8,128]' or a tuple of types."""
  return tuple(
    Array(dtype, tuple(int(n) for n in dims.split(",") if n), _HOST in layout)
    for dtype, dims, layout in _ARRAY.findall(text)
  )


def parse(text: str) -> Program:
  """Parses the text of a program.

  Args:
    text: From `executable.as_text()`.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
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


def _whole_lines(text: str) -> list[str]:
  """Splits into lines, and joins lines that the attributes of a kernel break in two."""
  whole: list[str] = []
  for line in text.splitlines():
    if whole and whole[-1].startswith("  ") and line and line != "}" and line[:2] != "  ":
      whole[-1] += line
    else:
      whole.append(line)
  return whole


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
  """Parses the text after 'NAME = '."""
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


def _closing(text: str, at: int) -> int:
  """Index of the parenthesis that closes the one at index `at`."""
  depth = 0
  for i in range(at, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  raise ValueError(f"unbalanced parentheses: {text[:80]}")


class Trips(NamedTuple):
  """Runs of the body of a `while` loop.

  Attributes:
    runs: Their number, or the one that is assumed.
    known: False if the number is assumed: a counter whose first value is not found starts at 0, one
      whose step is not found counts by 1, and a loop without a counter or a bound runs once.
  """

  runs: int
  known: bool


_UNKNOWN_TRIPS = Trips(1, False)


def trips(program: Program, computation: str, loop: Instruction) -> Trips:
  """The number of times that the body of a `while` loop runs.

  XLA often notes it. Otherwise it follows from the counter: its first value, its step, and the
  constant that it is compared with.

  Args:
    program: The program.
    computation: Name of the computation that contains the loop.
    loop: The `while` instruction.
  """
  # condition: compare(get-tuple-element(state, i), constant), direction=LT
  # body:      tuple(..., add(get-tuple-element(state, i), constant), ...)
  # outside:   while(tuple(..., constant, ...))
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return Trips(int(known[1]), True)
  condition = (loop.attribute("condition") or "").lstrip("%")
  compare, values = _comparison(program, condition)
  if compare is None:
    return _UNKNOWN_TRIPS
  start = program.find(computation, loop.operands[0])
  state = start.operands if start and start.opcode == "tuple" else ()
  first = lambda i: _constant(program, computation, state[i]) if i < len(state) else None
  direction = compare.attribute("direction") or ""
  ends = [v if kind == "constant" else first(v) for kind, v in values]
  counters = [v for kind, v in values if kind == "element"]
  if not counters or ends[1] is None:
    return _UNKNOWN_TRIPS
  begin = ends[0] if ends[0] is not None else 0
  step = _step(program, loop.body, counters[0])
  length = {
    "LT": ends[1] - begin,
    "LE": ends[1] - begin + 1,
    "GT": begin - ends[1],
    "GE": begin - ends[1] + 1,
    "NE": abs(ends[1] - begin),
  }.get(direction)
  if length is None:
    return _UNKNOWN_TRIPS
  runs = max(-(-length // abs(step or 1)), 0)
  return Trips(runs, ends[0] is not None and step is not None)


def _comparison(
  program: Program, condition: str
) -> tuple[Instruction | None, list[tuple[str, int]]]:
  """The comparison that ends a loop.

  Returns:
    (instruction, values): for each of the two values either ('constant', its value) or ('element',
    its index in the state of the loop). (None, []) if the condition has another form.
  """
  root = next(i for i in program.computations[condition] if i.is_root)
  inner = condition
  bind = {}
  if root.opcode == "fusion":
    inner = root.calls[0]
    bind = dict(enumerate(root.operands))
    root = next(i for i in program.computations[inner] if i.is_root)
  if root.opcode != "compare":
    return None, []

  def resolve(name: str, where: str) -> tuple[str, int]:
    made = program.find(where, name)
    if made is None:
      return ("element", -1)
    if made.opcode == "constant":
      value = _constant(program, where, name)
      return ("element", -1) if value is None else ("constant", value)
    if made.opcode == "get-tuple-element":
      return ("element", int(made.attribute("index") or 0))
    if made.opcode == "parameter" and where == inner and bind:
      return resolve(bind[int(made.operands[0])], condition)
    if made.opcode in ("copy", "bitcast", "convert"):
      return resolve(made.operands[0], where)
    return ("element", -1)

  values = [resolve(name, inner) for name in root.operands]
  if ("element", -1) in values or all(kind == "constant" for kind, _ in values):
    return None, []
  return root, values


def _constant(program: Program, computation: str, name: str) -> int | None:
  """The integer constant behind an instruction, or None."""
  made = program.find(computation, name)
  while made is not None and made.opcode in ("copy", "bitcast", "convert"):
    made = program.find(computation, made.operands[0])
  if made is None or made.opcode != "constant":
    return None
  try:
    return int(made.operands[0])
  except ValueError:
    return None


def _step(program: Program, body: str, element: int) -> int | None:
  """The increment of an element of the loop's state per iteration, or None if it is not found."""
  root = next(i for i in program.computations[body] if i.is_root)
  made = program.find(body, root.operands[element]) if root.opcode == "tuple" else None
  if made is None or made.opcode != "add":
    return None
  constants = [_constant(program, body, name) for name in made.operands]
  return next((c for c in constants if c), None)


def moved_arrays(program: Program, computation: str, made: Instruction) -> tuple[Array, ...]:
  """The arrays that a collective moves: its results, also of one that starts here.

  Of a ragged all-to-all it is the smaller of the two arrays between which rows move. That one has
  the rows of an even load, the other one room for more.

  Args:
    program: The program.
    computation: Name of the computation that contains the instruction.
    made: The collective.
  """
  found = made.arrays
  if made.opcode.endswith("-start"):
    # (operands, results, counters), or for an all-reduce the results alone.
    while len(found) > 1 and found[-1].dtype in ("u32", "s32") and not found[-1].dims:
      found = found[:-1]
    largest = (max(found, key=lambda array: array.bytes),)
    alone = found if made.opcode == "all-reduce-start" else largest
    found = found[len(made.operands) :] or alone
  if made.opcode.startswith("ragged-all-to-all"):
    given = program.find(computation, made.operands[0])
    found = (min((*found[:1], *(given.arrays[:1] if given else ())), key=lambda a: a.bytes),)
  return found


def matmul_flops(program: Program, computation: str, made: Instruction) -> float:
  """FLOPs of a matmul, two per multiply-add.

  Args:
    program: The program.
    computation: Name of the computation that contains the instruction.
    made: A `dot`, or a `convolution`, which the TPU compiler makes of dots.
  """
  types = {i.name: i.arrays for i in program.computations[computation]}
  operands = [types.get(name) for name in made.operands[:2]]
  if not all(operands):
    return 0
  out, (lhs, rhs) = made.arrays[0].dims, (arrays[0].dims for arrays in operands if arrays)
  if made.opcode == "dot":
    contracted = re.findall(r"\d+", made.attribute("lhs_contracting_dims") or "")
    return 2 * math.prod(out) * math.prod(lhs[int(d)] for d in contracted)
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", made.attributes)
  assert labels is not None, made.attributes
  # A matmul as a convolution: letters b (batch), f (features), i, o and digits (window dimensions)
  # say what each dimension of the operands and of the result is, as in 0bf_io0->0bf.
  of_lhs, of_rhs, of_out = labels.groups()
  match = re.search(r"window=\{([^}]*)\}", made.attributes)
  window = dict(field.split("=") for field in match[1].split()) if match else {}
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
def _hits(
  size_in: int,
  size_out: int,
  size: int,
  low_pad: int,
  stride: int,
  dilate_in: int,
  dilate_window: int,
) -> int:
  """Pairs (output, window position) that read an input and not padding or a dilation hole."""
  if size == 1 and low_pad == 0 and dilate_in == 1:
    return size_out
  at = np.arange(size_out)[:, None] * stride + np.arange(size)[None] * dilate_window - low_pad
  return int(((at % dilate_in == 0) & (at >= 0) & (at // dilate_in < size_in)).sum())


def groups(made: Instruction) -> np.ndarray | None:
  """The groups of partitions that a collective communicates within.

  XLA writes them as lists, as a permuted range, or as axes of a mesh. For a permutation the groups
  are its pairs.

  Returns:
    Array [groups, members], or None if the collective names none, which means all partitions.
  """
  text = made.attributes
  # Lists, {{0,2},{1,3}}, also the pairs of a permutation.
  pairs = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", text)
  if pairs:
    rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d, ]+)\}", pairs[1])]
    return np.array(rows) if len({len(row) for row in rows}) == 1 else None
  # A permuted range, [groups, members]<=[dims]T(order): arange, reshaped to dims and transposed.
  ranges = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
  if ranges:
    shape, dims, order = (
      [int(n) for n in text.split(",")] if text else None for text in ranges.groups()
    )
    assert shape is not None and dims is not None
    out = np.arange(math.prod(dims)).reshape(dims)
    return (out.transpose(order) if order else out).reshape(shape)
  # Axes of a mesh, mesh['a'=2,'b'=4] {'b'}. A mesh with its own device order is not understood.
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](, device_ids=\S*)? \{([^}]*)\}", text)
  return _mesh_groups(mesh[1], mesh[3]) if mesh and not mesh[2] else None


def _mesh_groups(mesh: str, axes: str) -> np.ndarray:
  """The groups of a mesh such as "'a'=2,'b'=4" over axes such as "'a','b':(1)2".

  A part of an axis is written as (size of the parts before it)size.
  """
  sizes = {name: int(n) for name, n in re.findall(r"'?([\w.]+)'?=(\d+)", mesh)}
  wanted = {
    name: (int(before or 1), int(size) if size else sizes[name])
    for name, before, size in re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?(?:,|$)", axes)
  }
  # Split each axis into (before, part, after); the parts become the members of a group.
  dims: list[int] = []
  inside = []
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
