"""The checkpoints of a run: listed, described, verified and compared, as they are on disk."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.run import checkpoints, run_folder
from jaxgpt.run.process import text_table
from jaxgpt.run.provenance import saved as saved_lib
from jaxgpt.run.provenance import seal
from jaxgpt.run.provenance.saved import Saved

DAMAGED = checkpoints.DAMAGED
_ONCE = ("best", "frozen", "reference", "teacher")  # folders with checkpoints of their own


class Entry(NamedTuple):
  """A checkpoint of a run in a list.

  Attributes:
    folder: 'checkpoints', 'damaged', 'best' …
    step: Its step.
    date: When it was complete, in UTC.
    bytes: Size of its files.
    items: Such as 'params opt'.
    note: What is known of it without reading its arrays, or ''.
  """

  folder: str
  step: int
  date: str
  bytes: int
  items: str
  note: str


def listed(run: epath.PathLike) -> list[Entry]:
  """The checkpoints of a run. Their arrays are not read.

  Raises:
    UserError: The folder holds no run.
  """
  run = run_folder.require_run(run)
  out = []
  for folder in (seal.CHECKPOINTS, DAMAGED, *_ONCE):
    for saved in saved_lib.all_of(run, folder):
      items = " ".join(saved.items())
      out.append(Entry(folder, saved.step, saved.date(), saved.size(), items, _note(saved)))
  return out


def _note(saved: Saved) -> str:
  if saved.folder == DAMAGED:
    return checkpoints.why_damaged(saved.run, saved.step) or "damaged; verify says why"
  found = seal.damaged_checkpoint(saved.run, saved.step) if _is_main(saved) else []
  try:
    if not saved.meta().get("digests"):
      return "no digests: an earlier version saved it"
  except ValueError as e:
    found.append(str(e))
  return f"damaged: {_first(found)}" if found else ""


def _is_main(saved: Saved) -> bool:
  return saved.folder == seal.CHECKPOINTS


def _first(found: Sequence[str]) -> str:
  return found[0] + (f" and {len(found) - 1} more" if len(found) > 1 else "")


def verified(run: epath.PathLike, step: int | None = None) -> Iterator[tuple[Saved, list[str]]]:
  """Reads checkpoints and compares them with their digests.

  Args:
    run: The run folder.
    step: A step. None: all checkpoints of the run, those of frozen parameters among them.

  Yields:
    (checkpoint, lines on what is wrong with it).

  Raises:
    UserError: There is no run, or no such checkpoint.
  """
  run = run_folder.require_run(run)
  if step is not None:
    chosen = [saved_lib.find(run, step)]
  else:
    folders = (seal.CHECKPOINTS, *_ONCE)
    chosen = [saved for folder in folders for saved in saved_lib.all_of(run, folder)]
  for saved in chosen:
    yield saved, saved_lib.problems(saved)


class Array(NamedTuple):
  """Figures of an array of a checkpoint. Norm, least and greatest are of its finite values."""

  name: str
  shape: tuple[int, ...]
  dtype: str
  norm: float
  least: float
  greatest: float
  not_finite: int


def shown(run: epath.PathLike, step: int | None = None) -> tuple[Saved, list[Array]]:
  """Figures of all arrays of a checkpoint.

  Args:
    run: The run folder.
    step: Step of the checkpoint. None: the newest.

  Raises:
    UserError: There is no such checkpoint, or it cannot be read.
  """
  saved = saved_lib.find(run_folder.require_run(run), step)
  return saved, [_figures(name, x) for name, x in read(saved).items()]


def _figures(name: str, x: np.ndarray) -> Array:
  values = x.astype(np.float64)
  finite = values[np.isfinite(values)]
  norm = float(np.sqrt(np.square(finite).sum()))
  ends = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
  return Array(name, x.shape, str(x.dtype), norm, *ends, values.size - finite.size)


def read(saved: Saved) -> dict[str, np.ndarray]:
  """{item/path: array} of a checkpoint.

  Raises:
    UserError: It cannot be read.
  """
  out: dict[str, np.ndarray] = {}
  for item in saved.items():
    try:
      out |= {f"{item}/{path}": x for path, x in saved.arrays(item).items()}
    except ValueError as e:
      raise UserError(f"checkpoint {saved.path}: {e}; name another one with --step") from e
  return out


class Change(NamedTuple):
  """The difference of an array between two checkpoints.

  Attributes:
    name: item/path of the array.
    largest: Largest absolute difference. inf if only one of them is not finite somewhere.
    relative: Norm of the difference over the norm of the first.
    changed: Share of the elements that differ in a bit.
    note: Why there are no figures: it is in one of them only, or has another shape or dtype.
  """

  name: str
  largest: float = 0.0
  relative: float = 0.0
  changed: float = 0.0
  note: str = ""


def compare(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> list[Change]:
  """Compares the arrays of two checkpoints.

  Args:
    first: {name: array}, from `read`.
    second: The same of the other one.

  Returns:
    The arrays that are not equal to the bit. Those without figures come first, then the largest
    relative difference.
  """
  out = []
  for name in sorted(first.keys() | second.keys()):
    if name not in first or name not in second:
      out.append(Change(name, note=f"only in the {'first' if name in first else 'second'}"))
    elif (a := first[name]).shape != (b := second[name]).shape or a.dtype != b.dtype:
      text = f"{a.dtype} {list(a.shape)} in the first, {b.dtype} {list(b.shape)} in the second"
      out.append(Change(name, note=text))
    elif change := _difference(name, a, b):
      out.append(change)
  return sorted(out, key=lambda change: (not change.note, -change.relative, change.name))


def _difference(name: str, a: np.ndarray, b: np.ndarray) -> Change | None:
  width = f"u{a.dtype.itemsize}"
  unequal = np.ascontiguousarray(a).view(width) != np.ascontiguousarray(b).view(width)
  if not unequal.any():
    return None
  x, y = a.astype(np.float64), b.astype(np.float64)
  with np.errstate(invalid="ignore"):
    gap = np.where(unequal, np.abs(x - y), 0.0)
  gap = np.where(np.isfinite(gap), gap, np.inf)
  scale = float(np.sqrt(np.square(x[np.isfinite(x)]).sum()))
  norm = float(np.sqrt(np.square(gap).sum()))
  relative = norm / scale if scale else float(np.inf if norm else 0.0)
  return Change(name, float(gap.max()), relative, float(unequal.mean()))


def compare_steps(
  runs: Sequence[epath.PathLike], steps: Sequence[int] = ()
) -> tuple[Saved, Saved, list[Change]]:
  """Compares two checkpoints, of one run or of two.

  Args:
    runs: One or two run folders.
    steps: Of one run, the two steps, or () for the two newest. Of two runs, the step of each, one
      for both, or () for the newest that both have.

  Raises:
    UserError: There are no such checkpoints.
  """
  folders = [run_folder.require_run(run) for run in runs]
  there = [[saved.step for saved in saved_lib.all_of(run)] for run in folders]
  if len(folders) == 1:
    if not steps and len(there[0]) < 2:
      raise UserError(
        f"{runs[0]} has {len(there[0])} checkpoint; name a second run to compare with"
      )
    if len(steps) == 1:
      raise UserError(f"--steps={steps[0]}: name two steps, or two runs")
    pair = tuple(steps) or tuple(there[0][-2:])
    folders = folders * 2
  else:
    common = sorted(set(there[0]) & set(there[1]))
    if not steps and not common:
      lists = "; ".join(f"{r}: {', '.join(map(str, s)) or 'none'}" for r, s in zip(runs, there))
      raise UserError(f"the runs have no step in common ({lists}); name one of each with --steps")
    pair = tuple(steps) or (common[-1],)
    pair = pair * 2 if len(pair) == 1 else pair
  a, b = (saved_lib.find(folder, step) for folder, step in zip(folders, pair))
  return a, b, compare(read(a), read(b))


def change_lines(changes: Sequence[Change], most: int = 0) -> list[str]:
  """Lines that show differences of arrays.

  Args:
    changes: From `compare`.
    most: Arrays to show. 0: all.
  """
  shown = changes[: most or None]
  rows = [
    (c.name, "", "", c.note)
    if c.note
    else (c.name, f"{c.largest:.3e}", f"{c.relative:.3e}", f"{c.changed:.1%}")
    for c in shown
  ]
  out = text_table.lines(("array", "largest", "relative", "elements"), rows) if rows else []
  rest = len(changes) - len(shown)
  return [*out, f"… and {rest} more arrays"] if rest else out
