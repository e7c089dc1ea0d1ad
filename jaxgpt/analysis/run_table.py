"""A table of the runs below a folder."""

import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from jaxgpt import config
from jaxgpt.analysis import curves
from jaxgpt.config.keys import KEYS
from jaxgpt.errors import UserError
from jaxgpt.run import resume, run_folder, run_lock
from jaxgpt.run.compression import record as record_lib

_DEPTH = 3  # of run folders below the given one
_SKIPPED = ("checkpoints", "tokenizer", "tensorboard", "set_aside", "damaged")
DONE, TRAINING, STOPPED, IMPORTED, BROKEN = "done", "training", "stopped", "imported", "broken"
COMPRESSED = "compressed"
COLUMNS = ("run", "status", "step", "loss", "validation", "bits_per_byte", "tokens_per_second")


class Row(NamedTuple):
  """A run.

  Attributes:
    run: Its folder, relative to the one that was asked for.
    status: 'done', 'training' (a process has its lock), 'stopped', 'imported',
      'compressed' or 'broken'.
    step: Step of its last metrics or checkpoint.
    steps: The run's number of steps.
    loss: Last training loss.
    validation: Last validation loss.
    bits_per_byte: Last bits per byte of the validation split.
    tokens_per_second: Median over its records.
    differs: {config key: value} of the keys in which the runs of the table differ.
    note: Why it is broken.
  """

  run: str
  status: str
  step: int = 0
  steps: int = 0
  loss: float | None = None
  validation: float | None = None
  bits_per_byte: float | None = None
  tokens_per_second: float | None = None
  differs: Mapping[str, Any] = types.MappingProxyType({})
  note: str = ""


def find(folder: epath.PathLike) -> list[epath.Path]:
  """The run folders in a folder, or the folder itself.

  Raises:
    UserError: There is none.
  """
  found = list(_below(epath.Path(folder), _DEPTH))
  if not found:
    raise UserError(f"{folder} holds no run, nor do the folders below it; name another folder")
  return sorted(found)


def _below(folder: epath.Path, depth: int) -> Sequence[epath.Path]:
  if not folder.is_dir():
    return []
  if run_folder.is_run(folder):
    return [folder]
  if not depth:
    return []
  inner = [p for p in folder.iterdir() if p.is_dir() and p.name not in _SKIPPED]
  return [run for path in inner for run in _below(path, depth - 1)]


def table(folder: epath.PathLike, sort: str = "run", descending: bool = False) -> list[Row]:
  """The runs below a folder.

  Args:
    folder: A folder with run folders.
    sort: One of `COLUMNS`, or a config key. Runs without a value come last.
    descending: The largest value first.

  Raises:
    UserError: There is no run, or no such column.
  """
  root, rows, flats = epath.Path(folder), list[Row](), list[dict[str, Any]]()
  for path in find(folder):
    name = path.relative_to(root).as_posix() if path != root else path.name
    row, flat = row_of(path, name)
    rows.append(row)
    flats.append(flat)
  keys = differing([flat for flat in flats if flat])
  rows = [
    row._replace(differs={key: flat.get(key) for key in keys} if row.status != BROKEN else {})
    for row, flat in zip(rows, flats)
  ]
  if sort not in COLUMNS and sort not in KEYS:
    raise UserError(
      f"--sort={sort}: no such column; there are {', '.join(COLUMNS)}, and the config keys in "
      f"which the runs differ: {', '.join(keys) or 'none'}"
    )
  return _sorted(rows, flats, sort, descending)


def row_of(
  path: epath.Path, name: str, records: curves.Curves | None = None
) -> tuple[Row, dict[str, Any]]:
  """A run and its flat config, {} if that cannot be read.

  Args:
    path: The run folder.
    name: Its name in the table.
    records: Its metrics, if they have been read.
  """
  try:
    c = run_folder.read_config(path)
    imported = run_folder.is_imported(path)
    compressed = record_lib.read(path) is not None
  except UserError as e:
    return Row(name, BROKEN, note=str(e)), {}
  records = curves.read(path) if records is None else records
  steps, problem = c.train.steps, ""
  reached = max((step for _, step in records), default=0)
  try:
    found = resume.find(path, reached)
  except UserError as e:  # its checkpoints are gone
    found, problem = resume.Resume(None, reached), str(e)
  step = max(found.step or 0, found.reached)
  status = IMPORTED if imported else DONE if (found.step or 0) >= steps else STOPPED
  if compressed:
    status = COMPRESSED
  if problem:
    status = BROKEN
  elif run_lock.holder(path):
    status = TRAINING
  speeds = [r["tokens_per_second"] for r in records.values() if r.get("tokens_per_second")]
  row = Row(
    name,
    status,
    step,
    steps,
    curves.last_of(records, "train", "loss"),
    curves.last_of(records, "validation", "loss"),
    curves.last_of(records, "validation", "bits_per_byte"),
    sorted(speeds)[len(speeds) // 2] if speeds else None,
    note=problem,
  )
  return row, config.flatten(c)


def differing(flats: Sequence[dict[str, Any]]) -> list[str]:
  """The keys in which configs differ. A key that follows from another one is left out."""
  keys = sorted({key for flat in flats for key in flat} - {"code_folder"})
  differing = [key for key in keys if len({repr(flat.get(key)) for flat in flats}) > 1]
  own = [key for key in differing if key not in KEYS or KEYS[key].derive is None]
  return own or differing  # only keys that others could derive: then they were set


def _sorted(
  rows: Sequence[Row], flats: Sequence[dict[str, Any]], sort: str, descending: bool
) -> list[Row]:
  values = [
    row._asdict()[sort] if sort in COLUMNS else flat.get(sort) for row, flat in zip(rows, flats)
  ]
  usable = lambda x: x is not None and not (isinstance(x, float) and math.isnan(x))
  there = [(value, row) for value, row in zip(values, rows) if usable(value)]
  numbers = all(isinstance(value, int | float) for value, _ in there)
  key = lambda pair: pair[0] if numbers else str(pair[0])
  ordered = [row for _, row in sorted(there, key=key, reverse=descending)]
  return ordered + [row for value, row in zip(values, rows) if not usable(value)]
