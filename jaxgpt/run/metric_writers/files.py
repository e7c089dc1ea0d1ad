"""Metric writers into files of the run folder: JSONL and CSV."""

import contextlib
import csv
import errno
import io
import json
import math
import os
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.run.metric_writers.writer import WRITERS, Entry, Metrics, MetricWriter, Run
from jaxgpt.storage import atomic, buckets, os_errors, strict_json

JSONL, CSV = "metrics.jsonl", "metrics.csv"
_CURE = "free some space or change its permissions"
_REMOTE_SECONDS = 10.0  # between two writes of the file to a bucket


class Jsonl(MetricWriter):
  """One JSON object per line in the run folder: step, kind, and the metrics at full precision.

  An object in a bucket cannot be appended to. There the file is written as a whole, but at most
  every 10 seconds.
  """

  def __init__(self, run: Run):
    self._path = run.folder / JSONL
    self._newest: dict[str, dict[str, Any]] = {}
    self._lines = ""  # not on disk yet; for buckets, the whole file
    self._file: io.FileIO | None = None
    self._size = self.unwritten = 0  # bytes of whole lines in the local file; lines not on disk
    self._written = time.monotonic()
    try:
      if self._path.exists():
        self._drop_lines_after(run.start)
      if not buckets.is_remote(self._path):
        self._file = io.FileIO(self._path, "ab")
        self._size = self._file.seek(0, os.SEEK_END)
    except OSError as e:
      raise os_errors.user_error(f"{self._path} cannot be written", e, _CURE) from e

  def _drop_lines_after(self, start: int) -> None:
    """Drops lines of steps that will be repeated, since the checkpoint is older than they are."""
    kept, lines = kept_until(read(self._path), start)
    self._newest = {r["kind"]: r for r in kept}
    atomic.write(self._path, lines)
    if buckets.is_remote(self._path):
      self._lines = lines

  def newest(self, step: int, kind: str) -> dict[str, Any] | None:
    """The metrics that were written for a step, if they are the newest of their kind."""
    record = self._newest.get(kind, {})
    return record if record.get("step") == step else None

  def write(self, step: int, kind: str, metrics: Metrics) -> None:
    self._newest[kind] = {"step": step, "kind": kind, **metrics}
    self._lines += strict_json.dumps(self._newest[kind]) + "\n"
    self.unwritten += 1
    if self._file is not None:
      self._append(self._file)  # at once: `tail -f` and plots follow the run
    elif time.monotonic() - self._written > _REMOTE_SECONDS:
      self.flush()

  def _append(self, file: io.FileIO) -> None:
    """Appends the lines that are not on disk yet. If this fails, the file ends as it did before."""
    data = self._lines.encode()
    with self._named_errors():
      try:
        if data and file.write(data) != len(data):
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      except OSError:
        with contextlib.suppress(OSError):
          file.truncate(self._size)
        raise
    self._size += len(data)
    self._lines, self.unwritten = "", 0

  def flush(self) -> None:
    self._written = time.monotonic()
    if self._file is not None:
      self._append(self._file)
    elif self._lines:
      with self._named_errors():
        atomic.write(self._path, self._lines)
        self.unwritten = 0

  def close(self) -> None:
    with self._file or contextlib.nullcontext():
      self.flush()

  @contextlib.contextmanager
  def _named_errors(self) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      raise UserError(f"{self._path} cannot be written ({e.strerror or e}); {_CURE}") from e


def read(path: epath.Path) -> str:
  """The text of a metrics.jsonl, with marks in the place of bytes that are no text."""
  return path.read_bytes().decode(errors="replace")


def kept_until(text: str, step: int) -> tuple[list[dict[str, Any]], str]:
  """The records of metrics.jsonl up to a step, and the lines that a start from there writes."""
  records = [record(line) for line in text.splitlines()]
  kept = [r for r in records if r and r["step"] <= step]
  return kept, "".join(strict_json.dumps(r) + "\n" for r in kept)


def record(line: str) -> dict[str, Any] | None:
  """A line of metrics.jsonl as a dict, or None if a kill cut it short or it is not a record."""
  try:
    found = json.loads(line)
    return found if {"step", "kind"} <= found.keys() else None
  except (ValueError, AttributeError):
    return None


WRITERS.add("jsonl", Entry(Jsonl))


class Csv(MetricWriter):
  """A line per number in metrics.csv: step, kind, metric, value at full precision.

  Each metric has lines of its own, because log lines and evaluations have different ones. A number
  that is not finite is left empty.
  """

  def __init__(self, run: Run):
    self._path = run.folder / CSV
    if buckets.is_remote(self._path):
      raise UserError(
        f"log.csv=True: {self._path} is in a bucket, where a file can't grow; leave it"
      )
    lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
    kept = [line for line in lines[1:] if _is_csv_until(line, run.start)]
    atomic.write(self._path, "".join(line + "\n" for line in ["step,kind,metric,value", *kept]))

  def write(self, step: int, kind: str, metrics: Metrics) -> None:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for name, value in metrics.items():
      rows.writerow((step, kind, name, repr(value) if math.isfinite(value) else ""))
    size = os.path.getsize(self._path)
    try:
      with self._path.open("a", encoding="utf-8") as file:
        file.write(text.getvalue())
    except OSError:
      with contextlib.suppress(OSError):
        os.truncate(self._path, size)  # never half of a line
      raise


def _is_csv_until(line: str, step: int) -> bool:
  """Whether a line of metrics.csv is whole and is of a step up to a given one."""
  first = line.partition(",")[0]
  return line.count(",") == 3 and first.isdecimal() and int(first) <= step


WRITERS.add("csv", Entry(Csv, wanted=lambda c: c.log.csv))
