"""Metric writers for experiment trackers: TensorBoard, Weights & Biases and MLflow."""

import hashlib
import os
import threading
import time
from collections.abc import Sequence

from jaxgpt import config
from jaxgpt.errors import optional
from jaxgpt.run.metric_writers.writer import WRITERS, Entry, Metrics, MetricWriter, Run, Sample

_EXPERIMENT = "jaxgpt"  # of MLflow
_MOST_PARAMS, _LONGEST_PARAM = 100, 500  # of MLflow: in a request, in characters
_TENSORBOARD_QUEUE = 100_000  # events that wait for the disk


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

  def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
    for i, sample in enumerate(samples):
      self._writer.add_text(f"samples/{i}", _markdown(sample), step)

  def close(self) -> None:
    self._writer.close()


WRITERS.add("tensorboard", Entry(TensorBoard, wanted=lambda c: c.log.tensorboard))


class WandB(MetricWriter):
  """A run in Weights & Biases. WANDB_MODE=offline keeps it in the run folder, without a network.

  Charts have the step of the run on their x axis. A start that repeats steps logs them again.
  """

  def __init__(self, run: Run):
    self._wandb = optional("wandb", "wandb", f"log.wandb={run.c.log.wandb!r}")
    where = hashlib.sha256(os.path.abspath(run.folder).encode()).hexdigest()[:16]
    self._run = self._wandb.init(
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

  def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
    table = self._wandb.Table(columns=["prompt", "text"], data=[list(one) for one in samples])
    self._run.log({"step": step, "samples": table})

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

  def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
    text = "\n\n".join(_markdown(sample) for sample in samples)
    self._client.log_text(self._id, text, f"samples/{step}.md")

  def close(self) -> None:
    self._client.set_terminated(self._id)


WRITERS.add("mlflow", Entry(MLflow, wanted=lambda c: bool(c.log.mlflow)))


def _markdown(sample: Sample) -> str:
  """Prompt and text, indented as code, so that no character of them is markup."""
  code = lambda text: "\n".join(f"    {line}" for line in text.split("\n"))
  return f"prompt:\n\n{code(sample.prompt)}\n\ntext:\n\n{code(sample.text)}"
