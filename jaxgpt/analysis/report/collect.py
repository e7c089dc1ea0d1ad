"""Reads run folders for the report. Reads no array of a checkpoint."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from jaxgpt.analysis import checkpoint_files, compare_runs, curves, run_table
from jaxgpt.analysis.report import data_card, goodput
from jaxgpt.analysis.report import samples as samples_lib
from jaxgpt.analysis.report import series as series_lib
from jaxgpt.errors import UserError
from jaxgpt.run import run_folder
from jaxgpt.run.provenance import environment, seal
from jaxgpt.storage import buckets

MOST_RUNS = 50
_POINTS_BYTES = 2_500_000  # of all curves on the page
_MOST_MARKS = 1000  # of a kind


class Run(NamedTuple):
  """A run.

  Attributes:
    name: Its name on the page.
    folder: The run folder.
    row: Its status and last figures.
    flat: {key: value} of its config.
    origin: {key: where the value came from}.
    starts: The records of its starts.
    environments: The environment of each start.
    series: Its metrics in few points.
    marks: {'starts', 'saves', 'evaluations': steps}.
    account: Its wall time.
    data: Its data.
    checkpoints: Its checkpoints.
    samples: The texts that it wrote as training went on, and notes, see `samples.of_run`.
    damages: Lines on files that are not as the run wrote them.
    difference: How it differs from the first run. None: it is the first.
  """

  name: str
  folder: epath.Path
  row: run_table.Row
  flat: dict[str, Any]
  origin: Mapping[str, str]
  starts: list[dict[str, Any]]
  environments: list[environment.Environment]
  series: dict[str, series_lib.Series]
  marks: dict[str, list[int]]
  account: goodput.Account
  data: data_card.DataCard
  checkpoints: list[checkpoint_files.Entry]
  damages: list[str]
  samples: tuple[list[dict[str, Any]], list[str]]
  difference: compare_runs.Comparison | None = None


def runs(given: Sequence[epath.PathLike]) -> list[Run]:
  """Reads runs.

  Args:
    given: Run folders, and folders with run folders.

  Raises:
    UserError: There is no run, too many, a broken one, or one in a bucket.
  """
  folders = list(dict.fromkeys(path for one in given for path in _find(one)))
  if len(folders) > MOST_RUNS:
    raise UserError(
      f"{len(folders)} runs are too many for one page (at most {MOST_RUNS}); name fewer of them"
    )
  names = _names(folders)
  counts = [_count_metrics(folder) for folder in folders]
  most = series_lib.buckets(counts, _POINTS_BYTES)
  found: list[Run] = []
  first: curves.Curves = {}
  for name, folder in zip(names, folders):
    records = curves.read(folder)
    run = _run(name, folder, records, most)
    if found:  # one pair of curves is in memory at a time
      compared = compare_runs.compare(folders[0], folder, (first, records))
      run = run._replace(difference=compared)
    else:
      first = records
    found.append(run)
  return found


def _find(given: epath.PathLike) -> list[epath.Path]:
  if buckets.is_remote(given):
    raise UserError(
      f"{given} is in a bucket; copy the run folder to this machine, then name the copy"
    )
  return run_table.find(given)


def _names(folders: Sequence[epath.Path]) -> list[str]:
  """Short names: the parts of the paths between those that all have in common."""
  parts = [pathlib.PurePath(folder).parts for folder in folders]
  if len(parts) == 1:
    return ["/".join(parts[0][-2:]).replace("//", "/")]
  shortest = min(map(len, parts))
  same = lambda i: len({path[i] for path in parts}) == 1
  begin = next((i for i in range(shortest) if not same(i)), shortest)
  end = next((i for i in range(1, shortest - begin + 1) if not same(-i)), shortest - begin + 1)
  names = ["/".join(path[begin : len(path) - end + 1]) for path in parts]
  return names if all(names) and len(set(names)) == len(names) else [str(f) for f in folders]


def _count_metrics(folder: epath.Path) -> int:
  """The number of metrics in the first records of a run, to share the page's size."""
  names = set()
  for number, record in enumerate(curves.lazily(folder)):
    names |= {(record["kind"], name) for name in record}
    if number > 200:
      break
  return len(names)


def _run(name: str, folder: epath.Path, records: curves.Curves, most: int) -> Run:
  row, flat = run_table.row_of(folder, name, records)
  if not flat:
    raise UserError(row.note)
  c = run_folder.read_config(folder)
  starts = run_folder.read_starts(folder)
  checkpoints = checkpoint_files.listed(folder)
  marks = {
    "starts": sorted({start.get("step") or 0 for start in starts}),
    "saves": _saves(starts, checkpoints),
    "evaluations": _thinned([step for kind, step in records if kind == "validation"]),
  }
  return Run(
    name,
    folder,
    row,
    flat,
    json.loads(run_folder.config_path(folder).read_text()).get("origin", {}),
    starts,
    [environment.read(folder, start) for start in starts],
    series_lib.of(records, most),
    marks,
    goodput.of_run(folder, records, _last_save(checkpoints)),
    data_card.of(c, starts[0]["data_digest"], records),
    checkpoints,
    ["its checkpoints are gone"] * bool(row.note)
    + [f"{damage.file} {damage.problem}" for damage in seal.check(folder)],
    samples_lib.of_run(folder),
  )


def _saves(
  starts: Sequence[Mapping[str, Any]], there: Sequence[checkpoint_files.Entry]
) -> list[int]:
  """Steps that are known to have been saved: those that are there, and the last of each start."""
  noted = {start["saved"] for start in starts if start.get("saved")}
  listed = {entry.step for entry in there if entry.folder == run_folder.CHECKPOINTS}
  return _thinned(sorted(noted | listed))


def _thinned(steps: list[int]) -> list[int]:
  """At most `_MOST_MARKS` of the steps, evenly spread."""
  every = -(-len(steps) // _MOST_MARKS) if steps else 1
  return steps[::every]


def _last_save(checkpoints: Sequence[checkpoint_files.Entry]) -> float | None:
  """When the last checkpoint was complete, in seconds since the epoch."""
  times = [
    seconds
    for entry in checkpoints
    if entry.folder == run_folder.CHECKPOINTS
    if (seconds := goodput.seconds_of(f"{entry.date}+00:00")) is not None
  ]
  return max(times, default=None)
