"""Checks of a run folder: it can be written, it holds this run or none, and there is room."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator

from etils import epath

from jaxgpt.commands.checks.finding import (
  OK,
  PROBLEM,
  WARNING,
  Finding,
  Known,
  tried,
  within,
)
from jaxgpt.commands.checks.training import state_bytes
from jaxgpt.run import label_names, resume, run_lock
from jaxgpt.run import run_folder as run_folder_lib
from jaxgpt.run.process import text_table
from jaxgpt.run.provenance import saved as saved_lib
from jaxgpt.run.provenance import seal
from jaxgpt.storage import buckets

_READ_BYTES = 1 << 30  # of checkpoints, that are read to verify their arrays
_PROBE_SECONDS = 60  # clients of buckets retry for minutes


def run_folder(folder: epath.PathLike, known: Known) -> Iterator[Finding]:
  """Checks a run folder.

  Args:
    folder: `--workdir`.
    known: The config and the model, if they are known.
  """
  folder = epath.Path(folder)
  where, error = within(_PROBE_SECONDS, lambda: probe(folder))
  if where is None:
    yield Finding(
      PROBLEM,
      "workdir",
      f"{folder} cannot be written ({type(error).__name__}: {error}); choose another --workdir, or "
      "change its permissions or your credentials",
    )
    return
  yield Finding(
    OK, "workdir", f"{where} is writable: a test file was written, renamed, read and deleted"
  )
  if run_folder_lib.is_run(folder):
    yield _same_run(folder, known)
    yield from _as_written(folder)
    if holder := run_lock.holder(folder):
      yield Finding(PROBLEM, "workdir", f"{holder} is training in {folder}: wait for it, or end it")
  elif run_folder_lib.holds_something_else(folder):
    yield Finding(
      PROBLEM, "workdir", f"{folder} is not empty and holds no run; choose a new folder"
    )
  if "://" not in str(folder):
    yield room(shutil.disk_usage(where).free, known)


def _same_run(folder: epath.Path, known: Known) -> Finding:
  old, finding = tried("workdir", lambda: run_folder_lib.read_config(folder))
  if old is None:
    assert finding is not None
    return finding
  found, finding = tried("workdir", lambda: resume.find(folder))
  if found is None:
    assert finding is not None
    return finding
  if known.c is None:
    return Finding(OK, "workdir", f"{folder} holds a run: {found.describe(old.train.steps)}")
  lines = run_folder_lib.changes(folder, label_names.settle(known.c, folder).c, {})
  if not lines:
    text = f"{folder} holds this run: {found.describe(known.c.train.steps)}"
    return Finding(OK, "workdir", text)
  return Finding(
    PROBLEM,
    "workdir",
    f"{folder} holds a run of another config ({lines}): restore the old values to resume it, or "
    "choose another --workdir to start a new run",
  )


def _as_written(folder: epath.Path) -> Iterator[Finding]:
  """Compares the files of a run, and its checkpoints, with their digests."""
  damages = seal.check(folder)
  for damage in damages:
    status = PROBLEM if damage.vital else WARNING
    yield Finding(status, "workdir", damage.describe(folder))
  if buckets.is_remote(folder):
    return
  found = saved_lib.all_of(folder)
  total = sum(saved.size() for saved in found)
  reads = total <= _READ_BYTES
  bad = {saved: lines for saved in found if (lines := _problems(saved, reads))}
  for saved, lines in bad.items():
    others = len(found) - len(bad)
    rest = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
    way = "train goes on from another one" if others else "no other one is whole"
    yield Finding(
      WARNING if others else PROBLEM,
      "workdir",
      f"checkpoint {saved.path} is damaged ({lines[0]}{rest}): {way}",
    )
  if not damages and not bad:
    text = f"all files are as the run wrote them, {len(found)} checkpoints among them"
    if not reads:
      text += f" as far as their sizes say ({text_table.size(total)}): "
      text += "jaxgpt checkpoint verify reads them"
    yield Finding(OK, "workdir", text)


def _problems(saved: saved_lib.Saved, reads: bool) -> list[str]:
  """Lines on the damages of a checkpoint. Without `reads`, its arrays are left out."""
  if reads:
    return saved_lib.problems(saved)
  found = seal.damaged_checkpoint(saved.run, saved.step)
  try:
    saved.meta()
  except ValueError as e:
    found.append(str(e))
  return found


def probe(folder: epath.Path) -> epath.Path:
  """Writes, syncs, renames, reads and deletes a file in a folder, or where it would be made.

  Returns:
    The folder that was tried. For a local path it is the nearest one that exists.

  Raises:
    Exception: The file system raised it, or an OSError says that the file was read back wrongly.
  """
  remote = "://" in str(folder)
  where = folder if remote else next(p for p in (folder, *folder.absolute().parents) if p.exists())
  if not where.is_dir() and not remote:
    raise NotADirectoryError(errno.ENOTDIR, "it is a file", str(where))
  first, second = (where / f".jaxgpt-doctor-{uuid.uuid4().hex}{end}" for end in ("", ".renamed"))
  text = "a probe of jaxgpt doctor; it may be deleted\n"
  try:
    with first.open("w") as f:
      f.write(text)
      f.flush()
      if not remote:
        os.fsync(f.fileno())
    first.replace(second)
    if second.read_text() != text:
      raise OSError(errno.EIO, "the file was read back with other content", str(second))
  finally:
    for path in (first, second):
      with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
  return where


def room(free: int, known: Known) -> Finding:
  """Checks that the checkpoints fit on a disk.

  Args:
    free: Free bytes of the disk.
    known: The config and the model, if they are known.
  """
  if known.parts is None or known.c is None:
    return Finding(OK, "room", f"{text_table.size(free)} free")
  one, keep = state_bytes(known.parts.state), known.c.checkpoint.keep or 1
  need = one * (keep + 1)  # the new one is complete before the oldest is deleted
  text = (
    f"{text_table.size(free)} free; a checkpoint takes {text_table.size(one)}, and checkpoint.keep="
    f"{keep} needs {text_table.size(need)}: {keep} and the one being written"
  )
  if free < 2 * one:
    return Finding(PROBLEM, "room", f"{text}: make room, or choose another --workdir")
  if free < need:
    return Finding(WARNING, "room", f"{text}: make room, or lower checkpoint.keep")
  return Finding(OK, "room", text)
