"""Where metrics go: the terminal, a JSONL file, TensorBoard."""

import json

from etils import epath
from rich import console, progress

from jaxgpt.errors import UserError

JSONL = "metrics.jsonl"


class Terminal:
  """A live progress line on a terminal; plain lines in a pipe or a file."""

  def __init__(self, total, start):
    """Args: total: steps of the run. start: the step at which it goes on."""
    self._console = console.Console(highlight=False, soft_wrap=True)
    self._total = total
    self._bar = progress.Progress(
        progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"), progress.BarColumn(20),
        progress.TextColumn("{task.fields[text]}"), progress.TextColumn("ETA"),
        progress.TimeRemainingColumn(compact=True), console=self._console,
        disable=not self._console.is_terminal)
    self._task = self._bar.add_task("", total=total, completed=start, text="compiling …")
    self._bar.start()

  def write(self, step, kind, metrics):
    text = _line(metrics)
    if kind == "train" and not self._bar.disable:
      self._bar.update(self._task, completed=step, text=text)
      return
    eta = ""
    if kind == "train" and metrics.get("step_time"):
      eta = f"  ETA {_clock((self._total - step) * metrics['step_time'])}"
    self._console.print(f"{kind:<10} step {step}/{self._total}  {text}{eta}")

  def close(self):
    self._bar.stop()


_SHOWN = (  # key, label, how it is printed
    ("loss", "loss", "{:.4f}"),
    ("bits_per_byte", "bits/byte", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("lr", "lr", "{:.2e}"),
    ("grad_norm", "grad norm", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu", "MFU", "{:.1%}"),
)


def _line(metrics):
  return "  ".join(f"{label} {form.format(metrics[key])}" for key, label, form in _SHOWN
                   if metrics.get(key) is not None)


def _clock(seconds):
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Jsonl:
  """One JSON object a line in the run folder: step, kind, and the metrics at full precision."""

  def __init__(self, folder, start):
    """Args: folder: the run's. start: the step at which it goes on; later lines are dropped."""
    self._path = epath.Path(folder) / JSONL
    if self._path.exists():
      kept = [line for line in self._path.read_text().splitlines() if _step(line) <= start]
      self._path.write_text("".join(line + "\n" for line in kept))
    self._file = self._path.open("a")

  def write(self, step, kind, metrics):
    self._file.write(json.dumps({"step": step, "kind": kind, **metrics}) + "\n")
    self._file.flush()

  def close(self):
    self._file.close()


def _step(line):
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError):  # a line that a kill cut short
    return float("inf")


class TensorBoard:
  """Event files in the run folder's `tensorboard`."""

  def __init__(self, folder, start):
    try:
      import tensorboardX
    except ImportError as e:
      raise UserError("log.tensorboard=True needs tensorboardX: pip install 'jaxgpt[track]'") from e
    self._writer = tensorboardX.SummaryWriter(str(epath.Path(folder) / "tensorboard"),
                                              purge_step=start + 1)

  def write(self, step, kind, metrics):
    for name, value in metrics.items():
      self._writer.add_scalar(f"{kind}/{name}", value, step)

  def close(self):
    self._writer.close()


class Writers:
  """Several writers as one."""

  def __init__(self, *writers):
    self._writers = writers

  def write(self, step, kind, metrics):
    """Args: step: updates so far. kind: 'train' or 'validation'. metrics: {name: float}."""
    for writer in self._writers:
      writer.write(step, kind, metrics)

  def close(self):
    for writer in self._writers:
      writer.close()


def make(c_log, folder, total, start):
  """The writers that the config asks for.

  Args:
    c_log: the config's `log` section.
    folder: the run's.
    total: steps of the run.
    start: the step at which it goes on.
  """
  extra = [TensorBoard(folder, start)] if c_log.tensorboard else []
  return Writers(Terminal(total, start), Jsonl(folder, start), *extra)
