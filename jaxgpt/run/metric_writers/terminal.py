"""The metric writer for the terminal: a live line, or plain lines in a pipe or a file."""

from collections.abc import Sequence

from rich import console

from jaxgpt.run.metric_writers.writer import WRITERS, Entry, Metrics, MetricWriter, Run, Sample
from jaxgpt.run.process import live_line

_WIDTH = 100  # characters of a sample


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

  def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
    for sample in samples:
      text = repr(sample.prompt + sample.text)
      shown = text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"
      self._console.print(f"{'sample':<10} step {step}/{self._total}  {shown}", markup=False)

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
