"""Parser for a kernel's final schedule: the bundles of its loop, by the condition they run under.

A TPU core executes one bundle of instructions per cycle, unless it waits for memory. A line of the
schedule is a bundle. A kernel is a loop over its grid, with regions that a branch may skip:

     0x1b LB: > { ... } /* Start region 138 */         the loop
     0x9b   : > { sbr.rel (%p1) target = $region36 }   skips up to region 36: in the first iteration
     0xd0   : > { sbr.rel (%p2) target = $region52 }     skips: the first block of a row
    0x136 PF: > { ... } /* Start/End empty region 52 */
    0x144   : > { sbr.rel (%p3) target = $region56 }     skips: blocks that the mask hides
    0x145   : > { vmatmul ... }
    0x4d4 PF: > { ... } /* Start/End empty region 56 */
    0x59b PF: > { ... } /* Start/End empty region 36 */
    0x5b1   : > { sbr.rel (!%p4) target = $region138 } the next iteration

Bundles sort into four kinds by these branches: outside of the loop, every iteration (`step`),
the region with the matmuls (`block`), and the other regions (`ends`).
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxgpt.plan import hlo

_LINE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:([A-Z]{2})\s*)?:")
_BRANCH = re.compile(r"sbr\.rel (\([^)]*\) )?target = \$region(\d+)")
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_MATMUL = "vmatmul"
_WINDOW = re.compile(
  r"inlined_call_operand\.(\w+) \[shape: [^,]*(?:,\d+)*\], index: (\d+), kind: (input|output).*?"
  r"The window shape is (\w+\[[\d,]*\]), while the full shape is (\w+\[[\d,]*\])"
)
_GRID = re.compile(r"iteration_bounds: \(([\d, ]+)\)")


class NotUnderstood(Exception):
  """The schedule has another form than the kernels that this parser knows."""


class Window(NamedTuple):
  """The part of an operand that one iteration of the grid works on.

  Attributes:
    memory: Where the operand is, 'hbm' or 'vmem'. Only those in HBM are copied.
    kind: 'input' or 'output'.
    part: Type of the part.
    whole: Type of the operand.
  """

  memory: str
  kind: str
  part: hlo.Array
  whole: hlo.Array


class Schedule(NamedTuple):
  """Bundles of a kernel.

  Attributes:
    outside: Bundles before and after the loop.
    step: Bundles of each iteration, whether or not its block is computed.
    block: Additional bundles where a block is computed: the region with the matmuls.
    ends: Additional bundles of the other regions, which start and finish a row of blocks.
    grid: Iterations of one core by dimension, outermost first. () if the kernel copies nothing.
    windows: Windows of the operands, in their order.
  """

  outside: int
  step: int
  block: int
  ends: int
  grid: tuple[int, ...]
  windows: tuple[Window, ...]


class _Bundle(NamedTuple):
  """A line of the schedule.

  Attributes:
    at: Address of the bundle.
    mark: Mark of the line, such as 'LB' for the start of a loop's body.
    text: The line, and those that a comment continues on.
    bundles: Bundles up to the next line.
  """

  at: int
  mark: str
  text: str
  bundles: int


def parse(text: str) -> Schedule:
  """Parses the schedule of a kernel.

  Args:
    text: A file `*-final_bundles.txt`.

  Raises:
    NotUnderstood: No loop, several loops, or no matmul in the loop.
  """
  found = list(_bundles(text))
  starts = {int(n): b.at for b in found for n in _START.findall(b.text)}
  headers = [b.at for b in found if b.mark == "LB"]
  if len(headers) != 1:
    raise NotUnderstood(f"{len(headers)} loops")
  branches = [
    (b.at, starts.get(int(m[2]), -1))
    for b in found
    for m in _BRANCH.finditer(b.text)
    if b.at >= headers[0]
  ]
  back = [at for at, target in branches if target == headers[0]]
  if len(back) != 1 or any(target < 0 for _, target in branches):
    raise NotUnderstood("branches to unknown places")
  first, last = headers[0], back[0]
  inside = [b for b in found if first <= b.at <= last]
  # A branch skips the bundles after it, up to its target.
  regions = [(at + 1, target) for at, target in branches if at < target and at < last]
  matmuls = [b.at for b in inside if _MATMUL in b.text]
  if not matmuls:
    raise NotUnderstood("no matmul in the loop")
  around = [r for r in regions if r[0] <= matmuls[0] and matmuls[-1] < r[1]]
  block = min(around, key=lambda r: r[1] - r[0]) if around else (first, last + 1)
  counts = dict.fromkeys(("step", "block", "ends"), 0)
  for b in inside:
    region = _innermost(regions, b.at)
    if region is None or (region in around and region != block):
      counts["step" if around else "block"] += b.bundles
    else:
      computes = any(region[0] <= at < region[1] for at in matmuls)
      counts["block" if computes else "ends"] += b.bundles
  bounds = _GRID.findall(text)
  grid = max((tuple(map(int, g.split(","))) for g in bounds), key=math.prod, default=())
  outside = sum(b.bundles for b in found) - sum(counts.values())
  return Schedule(outside, **counts, grid=grid, windows=tuple(_windows(text)))


def _bundles(text: str) -> Iterator[_Bundle]:
  """The bundles of a schedule. Comments may break one into several lines."""
  heads: list[tuple[int, str, list[str]]] = []
  for line in text.splitlines():
    found = _LINE.match(line)
    if found:
      heads.append((int(found[1], 16), found[2] or "", [line]))
    elif heads:
      heads[-1][2].append(line)
  ends = [at for at, _, _ in heads[1:]] + [heads[-1][0] + 1 if heads else 0]
  for (at, mark, lines), end in zip(heads, ends, strict=True):
    yield _Bundle(at, mark, "\n".join(lines), end - at)


def _innermost(regions: list[tuple[int, int]], at: int) -> tuple[int, int] | None:
  """The smallest region that contains an address, or None."""
  around = [r for r in regions if r[0] <= at < r[1]]
  return min(around, key=lambda r: r[1] - r[0], default=None)


def _windows(text: str) -> Iterator[Window]:
  """The windows of the operands, from the comments of the first bundle."""
  for memory, _, kind, part, whole in _WINDOW.findall(text):
    yield Window(memory, kind, hlo.arrays(part)[0], hlo.arrays(whole)[0])
