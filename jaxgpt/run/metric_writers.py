"""Where metrics go: the terminal, a JSONL file, TensorBoard."""

import contextlib
import json
import time

from etils import epath
from rich import console, progress

from jaxgpt.errors import UserError
from jaxgpt.parallel import distributed
from jaxgpt.run import run_folder
from jaxgpt.storage import buckets

JSONL = "metrics.jsonl"
_REMOTE_SECONDS = 10.0  # between two writes of the file to a bucket


class Terminal:
  """A live progress line on a terminal; plain lines in a pipe or a file."""

  def __init__(self, total, start):
    """Args: total: steps of the run. start: the step at which it goes on."""
    self._console = console.Console(highlight=False, soft_wrap=True)
    self._total = total
    self._bar = progress.Progress(
      progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
      progress.BarColumn(20),
      progress.TextColumn("{task.fields[text]}"),
      progress.TextColumn("ETA"),
      progress.TimeRemainingColumn(compact=True),
      console=self._console,
      disable=not self._console.is_terminal,
    )
    self._task = self._bar.add_task("", total=total, completed=start, text="compiling …")
    self._bar.start()

  def write(self, step, kind, metrics):
    """See `Writers.write`."""
    text = _line(metrics)
    if kind == "train" and not self._bar.disable:
      self._bar.update(self._task, completed=step, text=text)
      return
    eta = ""
    if kind == "train" and metrics.get("step_time"):
      eta = f"  ETA {_clock((self._total - step) * metrics['step_time'])}"
    self._console.print(f"{kind:<10} step {step}/{self._total}  {text}{eta}")

  def close(self):
    """Leaves the terminal as it was."""
    self._bar.stop()


_SHOWN = (  # key, label, how it is printed
  ("loss", "loss", "{:.4f}"),
  ("bits_per_byte", "bits/byte", "{:.4f}"),
  ("perplexity", "perplexity", "{:.2f}"),
  ("accuracy", "accuracy", "{:.4f}"),
  ("lr", "lr", "{:.2e}"),
  ("grad_norm", "grad norm", "{:.2f}"),
  ("tokens_per_second", "tokens/s", "{:,.0f}"),
  ("mfu", "MFU", "{:.1%}"),
)


def _line(metrics):
  return "  ".join(
    f"{label} {form.format(metrics[key])}"
    for key, label, form in _SHOWN
    if metrics.get(key) is not None
  )


def _clock(seconds):
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Jsonl:
  """One JSON object a line in the run folder: step, kind, and the metrics at full precision.

  In a bucket, where nothing can be appended to, the file is written anew, but seldom.
  """

  def __init__(self, folder, start):
    """Args: folder: the run's. start: the step at which it goes on; later lines are dropped."""
    self._path = epath.Path(folder) / JSONL
    self._newest, self._lines = {}, ""
    self._file, self._said = None, time.monotonic()
    with self._named_errors():
      if self._path.exists():
        records = [_record(line) for line in self._path.read_text().splitlines()]
        records = [r for r in records if r and r["step"] <= start]
        self._newest = {r["kind"]: r for r in records}
        self._lines = "".join(json.dumps(r) + "\n" for r in records)
        run_folder.write_whole(self._path, self._lines)
      if not buckets.is_remote(self._path):
        self._file = self._path.open("a")

  def newest(self, step, kind):
    """The metrics that were written for a step, if they are the newest of their kind; or None."""
    record = self._newest.get(kind, {})
    return record if record.get("step") == step else None

  def write(self, step, kind, metrics):
    """See `Writers.write`."""
    self._newest[kind] = {"step": step, "kind": kind, **metrics}
    line = json.dumps(self._newest[kind]) + "\n"
    if self._file is None:
      self._lines += line
      if time.monotonic() - self._said > _REMOTE_SECONDS:
        self.flush()
      return
    with self._named_errors():
      self._file.write(line)
      self._file.flush()

  def flush(self):
    """Returns when all lines are in the file."""
    self._said = time.monotonic()
    if self._file is None and self._lines:
      with self._named_errors():
        run_folder.write_whole(self._path, self._lines)

  def close(self):
    """Closes the file."""
    self.flush()
    if self._file is not None:
      self._file.close()

  @contextlib.contextmanager
  def _named_errors(self):
    try:
      yield
    except OSError as e:
      raise UserError(
        f"{self._path} can't be written ({e.strerror or e}); make room or change its "
        "permissions, then the same command goes on"
      ) from e


def _record(line):
  """A line as a dict; None where a kill cut it short or it is no record."""
  try:
    record = json.loads(line)
    return record if {"step", "kind"} <= record.keys() else None
  except (ValueError, AttributeError):
    return None


class TensorBoard:
  """Event files in the run folder's `tensorboard`."""

  def __init__(self, folder, start):
    try:
      import tensorboardX
    except ImportError as e:
      raise UserError("log.tensorboard=True needs tensorboardX: pip install 'jaxgpt[track]'") from e
    self._writer = tensorboardX.SummaryWriter(
      str(epath.Path(folder) / "tensorboard"), purge_step=start + 1
    )

  def write(self, step, kind, metrics):
    """See `Writers.write`."""
    for name, value in metrics.items():
      self._writer.add_scalar(f"{kind}/{name}", value, step)

  def close(self):
    """Writes what is buffered."""
    self._writer.close()


class Writers:
  """Several writers as one."""

  def __init__(self, jsonl, *others):
    self.newest, self.flush = jsonl.newest, jsonl.flush
    self._writers = (jsonl, *others)

  def write(self, step, kind, metrics):
    """Args: step: updates so far. kind: 'train' or 'validation'. metrics: {name: float}."""
    for writer in self._writers:
      writer.write(step, kind, metrics)

  def close(self):
    """Closes them all."""
    for writer in self._writers:
      writer.close()


class Silent:
  """What the other processes have in place of `Writers`: the first one writes for all."""

  def newest(self, step, kind):
    """See `Jsonl.newest`; the first process knows."""

  def write(self, step, kind, metrics):
    """See `Writers.write`."""

  def flush(self):
    """See `Jsonl.flush`."""

  def close(self):
    """Nothing is open."""


def make(c_log, folder, total, start):
  """The writers that the config asks for, in the first process; `Silent` in the others.

  Args:
    c_log: the config's `log` section.
    folder: the run's.
    total: steps of the run.
    start: the step at which it goes on.
  """
  if not distributed.is_first():
    return Silent()
  jsonl = Jsonl(folder, start)
  extra = [TensorBoard(folder, start)] if c_log.tensorboard else []
  return Writers(jsonl, *extra, Terminal(total, start))
