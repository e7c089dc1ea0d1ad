"""Metric writers: the terminal, JSONL and CSV in the run folder, TensorBoard, W&B and MLflow.

A writer is a subclass of `MetricWriter` and an entry of `WRITERS` that says which configs turn it
on. docs/extending.md shows how to add one.
"""

import contextlib
import csv
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import ml_collections
from etils import epath
from rich import console

from jaxgpt import config
from jaxgpt.config.registry import Registry
from jaxgpt.errors import UserError, first_line, nearest, optional
from jaxgpt.parallel import distributed
from jaxgpt.run.process import live_line, output
from jaxgpt.storage import atomic, buckets, strict_json

JSONL, CSV = "metrics.jsonl", "metrics.csv"
_EXPERIMENT = "jaxgpt"  # of MLflow
_MOST_PARAMS, _LONGEST_PARAM = 100, 500  # of MLflow: in a request, in characters
_REMOTE_SECONDS = 10.0  # between two writes of the file to a bucket
_TENSORBOARD_QUEUE = 100_000  # events that wait for the disk

Metrics: TypeAlias = Mapping[str, float]


class Run(NamedTuple):
  """The facts about a start of a run that writers need."""

  c: ml_collections.ConfigDict  # the resolved config
  folder: epath.Path  # the run folder
  start: int  # step at which this start of the run begins


class MetricWriter:
  """Receives the metrics of a run, in the first process. Subclasses implement `write`.

  A method that raises an exception does not end the run: it is named once, and called again with
  the next metrics.
  """

  def write(self, step: int, kind: str, metrics: Metrics) -> None:
    """Takes metrics.

    Args:
      step: Updates so far.
      kind: 'train' (means since the last log line) or 'validation'.
      metrics: {name: value}, such as 'loss' or 'tokens_per_second'.
    """
    raise NotImplementedError

  def newest(self, step: int, kind: str) -> dict[str, Any] | None:
    """The metrics stored for a step, if the writer can read them back, else None."""
    return None

  def flush(self) -> None:
    """Returns when everything written so far is stored. Called before each checkpoint."""

  def close(self) -> None:
    """Stores everything written and releases resources."""


@dataclasses.dataclass(frozen=True)
class Entry:
  """An entry of `WRITERS`.

  Attributes:
    open: Makes the writer for a start of a run. May raise a UserError.
    wanted: Whether a resolved config turns the writer on.
    options: The keys below `log.options` that the writer reads.
  """

  open: Callable[[Run], MetricWriter]
  wanted: Callable[[ml_collections.ConfigDict], bool] = lambda c: True
  options: Sequence[str] = ()


WRITERS: Registry[Entry] = Registry("metric writer")


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
    with self._named_errors():
      if self._path.exists():
        self._drop_lines_after(run.start)
      if not buckets.is_remote(self._path):
        self._file = io.FileIO(self._path, "ab")
        self._size = self._file.seek(0, os.SEEK_END)

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
      raise UserError(
        f"{self._path} cannot be written ({e.strerror or e}); free some space or change its "
        "permissions"
      ) from e


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


class TensorBoard(MetricWriter):
  """Event files in the folder `tensorboard` of the run folder."""

  def __init__(self, run: Run):
    self._tensorboardx = optional("tensorboardX", "track", "log.tensorboard=True")
    self._folder = str(run.folder / "tensorboard")
    self._opened = 0  # event files of this start
    self._open(run.start + 1)
    lines = [f"- `{key}`: `{value!r}`" for key, value in config.flatten(run.c).items()]
    self._writer.add_text("config", "\n".join(lines), run.start)

  def _open(self, step: int) -> None:
    """Begins an event file. `step` hides events of steps that will be repeated."""
    self._opened += 1
    before = set(threading.enumerate())
    # A full queue would block the run once the library's thread has died of a full disk.
    self._writer = self._tensorboardx.SummaryWriter(
      self._folder,
      purge_step=step,
      max_queue=_TENSORBOARD_QUEUE,
      filename_suffix=f".{self._opened}",
    )
    self._threads = set(threading.enumerate()) - before

  def write(self, step: int, kind: str, metrics: Metrics) -> None:
    if not all(thread.is_alive() for thread in self._threads):
      self._open(step)
      raise OSError("an event file could not be written; a new one begins")
    for name, value in metrics.items():
      self._writer.add_scalar(f"{kind}/{name}", value, step)

  def close(self) -> None:
    self._writer.close()


WRITERS.add("tensorboard", Entry(TensorBoard, wanted=lambda c: c.log.tensorboard))


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


class WandB(MetricWriter):
  """A run in Weights & Biases. WANDB_MODE=offline keeps it in the run folder, without a network.

  Charts have the step of the run on their x axis. A start that repeats steps logs them again.
  """

  def __init__(self, run: Run):
    wandb = optional("wandb", "wandb", f"log.wandb={run.c.log.wandb!r}")
    where = hashlib.sha256(os.path.abspath(run.folder).encode()).hexdigest()[:16]
    self._run = wandb.init(
      project=run.c.log.wandb,
      name=run.folder.name,
      id=where,  # the same for all starts of the run
      dir=str(run.folder),
      config=config.flatten(run.c),
      resume="allow",
    )
    self._run.define_metric("*", step_metric="step")

  def write(self, step: int, kind: str, metrics: Metrics) -> None:
    self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in metrics.items()}})

  def close(self) -> None:
    self._run.finish()


WRITERS.add("wandb", Entry(WandB, wanted=lambda c: bool(c.log.wandb)))


class MLflow(MetricWriter):
  """A run in MLflow: in a folder, in a database (sqlite:///…) or on a server."""

  def __init__(self, run: Run):
    uri = run.c.log.mlflow
    if "://" not in uri or uri.startswith("file:"):  # newer versions want to be told so
      os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = optional("mlflow", "mlflow", f"log.mlflow={uri!r}")
    self._entities = optional("mlflow.entities", "mlflow", f"log.mlflow={uri!r}")
    self._client = mlflow.MlflowClient(tracking_uri=uri)
    found = self._client.get_experiment_by_name(_EXPERIMENT)
    number = found.experiment_id if found else self._client.create_experiment(_EXPERIMENT)
    self._id = self._client.create_run(number, run_name=run.folder.name).info.run_id
    params = [
      self._entities.Param(key, str(value)[:_LONGEST_PARAM])
      for key, value in config.flatten(run.c).items()
      if str(value)
    ]
    for begin in range(0, len(params), _MOST_PARAMS):
      self._client.log_batch(self._id, params=params[begin : begin + _MOST_PARAMS])

  def write(self, step: int, kind: str, metrics: Metrics) -> None:
    now = int(time.time() * 1000)
    entries = [
      self._entities.Metric(f"{kind}/{name}", value, now, step) for name, value in metrics.items()
    ]
    self._client.log_batch(self._id, metrics=entries)

  def close(self) -> None:
    self._client.set_terminated(self._id)


WRITERS.add("mlflow", Entry(MLflow, wanted=lambda c: bool(c.log.mlflow)))


class Terminal(MetricWriter):
  """A live progress line on a terminal. Plain lines in a pipe or a file."""

  def __init__(self, run: Run):
    self._console = console.Console(highlight=False, soft_wrap=True)
    self._total = run.c.train.steps
    every = {"evaluation": run.c.eval.every, "save": run.c.checkpoint.every}
    self._live = live_line.LiveLine(self._console, self._total, run.start, every)

  def write(self, step: int, kind: str, metrics: Metrics) -> None:
    text = _line(metrics)
    if kind == "train" and self._live.shown:
      self._live.update(step, text, metrics.get("loss"))
      return
    eta = ""
    if kind == "train" and metrics.get("step_time"):
      eta = f"  ETA {_clock((self._total - step) * metrics['step_time'])}"
    self._console.print(f"{kind:<10} step {step}/{self._total}  {text}{eta}")

  def close(self) -> None:
    """Leaves the terminal as it was."""
    self._live.close()


WRITERS.add("terminal", Entry(Terminal))

_EVALUATORS = ("task/",)  # prefixes of the metrics of `training.evaluators`
_SHOWN = (  # metrics on the terminal: key, label, format
  ("loss", "loss", "{:.4f}"),
  ("bits_per_byte", "bits/byte", "{:.4f}"),
  ("perplexity", "perplexity", "{:.2f}"),
  ("accuracy", "accuracy", "{:.4f}"),
  ("margin", "margin", "{:.4f}"),
  ("kl", "KL", "{:.4f}"),
  ("mse", "MSE", "{:.4f}"),
  ("mae", "MAE", "{:.4f}"),
  ("lr", "lr", "{:.2e}"),
  ("grad_norm", "grad norm", "{:.2f}"),
  ("tokens_per_second", "tokens/s", "{:,.0f}"),
  ("mfu", "MFU", "{:.1%}"),
  ("skipped_steps", "skipped", "{:.0f}"),
)


def _line(metrics: Metrics) -> str:
  """The metrics that are shown on the terminal. Those of evaluators have a / in their names."""
  of_evaluators = [(key, key, "{:.4f}") for key in metrics if key.startswith(_EVALUATORS)]
  return "  ".join(
    f"{label} {form.format(metrics[key])}"
    for key, label, form in (*_SHOWN, *of_evaluators)
    if metrics.get(key) is not None
  )


def _clock(seconds: float) -> str:
  minutes, rest = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Writers(MetricWriter):
  """Several writers as one. One that fails is named once, and the run and the others go on."""

  def __init__(self, *writers: MetricWriter):
    self._writers = writers
    self._failing: set[MetricWriter] = set()

  def write(self, step: int, kind: str, metrics: Metrics) -> None:
    for writer in self._writers:
      works = self._try(writer, lambda w: w.write(step, kind, metrics))
      if works and writer in self._failing:
        self._failing.remove(writer)
        output.warn(f"the metric writer {type(writer).__name__} works again")

  def _try(self, writer: MetricWriter, call: Callable[[MetricWriter], None]) -> bool:
    try:
      call(writer)
    except Exception as e:  # of a disk, a network, or a user's own code
      if writer not in self._failing:
        self._failing.add(writer)
        kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
        output.warn(
          f"the metric writer {type(writer).__name__} fails, and the run goes on: "
          f"{kind}{first_line(e, 300)}"
        )
      return False
    return True

  def newest(self, step: int, kind: str) -> dict[str, Any] | None:
    found = (writer.newest(step, kind) for writer in self._writers)
    return next((metrics for metrics in found if metrics is not None), None)

  def flush(self) -> None:
    for writer in self._writers:
      self._try(writer, lambda w: w.flush())

  def unwritten(self) -> int:
    """Lines of metrics.jsonl that could not be written."""
    return sum(writer.unwritten for writer in self._writers if isinstance(writer, Jsonl))

  def close(self) -> None:
    for writer in self._writers:
      self._failing.discard(writer)  # what is lost now is lost for good
      self._try(writer, lambda w: w.close())


def check_options(c: ml_collections.ConfigDict) -> None:
  """Raises a UserError for a key of `log.options` that no writer reads."""
  options = [name for entry in WRITERS.values() for name in entry.options]
  for name in c.log.options:
    if name not in options:
      raise UserError(
        f"log.options.{name}: no metric writer reads it; {nearest(name, options)}there are: "
        f"{', '.join(options) or 'none'}"
      )


def make(c: ml_collections.ConfigDict, folder: epath.PathLike, start: int) -> Writers:
  """Opens the writers that a config turns on. Only the first process has any.

  Args:
    c: The resolved config.
    folder: The run folder.
    start: Step at which this start of the run begins.

  Raises:
    UserError: A key of `log.options` that no writer reads, or a writer that cannot be opened.
  """
  check_options(c)
  if not distributed.is_first():
    return Writers()
  run = Run(c, epath.Path(folder), start)
  wanted = [(name, entry) for name, entry in WRITERS.items() if entry.wanted(c)]
  return Writers(*filter(None, (_open(name, entry, run) for name, entry in wanted)))


def _open(name: str, entry: Entry, run: Run) -> MetricWriter | None:
  """A writer, or None, and a warning, if a server or a library fails."""
  try:
    return entry.open(run)
  except UserError:
    raise
  except Exception as e:  # whatever a library raises without a network
    output.warn(
      f"the metric writer {name} can't be opened, and the run goes on without it: "
      f"{type(e).__name__}: {first_line(e, 300)}"
    )
    return None
