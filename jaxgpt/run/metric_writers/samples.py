"""The writer of texts that the model wrote during training: samples.jsonl in the run folder."""

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from jaxgpt.run.metric_writers.writer import WRITERS, Entry, Metrics, MetricWriter, Run, Sample
from jaxgpt.storage import atomic, strict_json

SAMPLES = "samples.jsonl"


class Samples(MetricWriter):
  """A line for each step with samples: {"step", "samples": [{"prompt", "text"}]}.

  The file is written as a whole each time, which a bucket can do too: samples are few.
  """

  def __init__(self, run: Run):
    self._path = run.folder / SAMPLES
    # A start that repeats steps writes their samples again.
    self._records = [r for r in read_samples(run.folder) if r["step"] <= run.start]

  def write(self, step: int, kind: str, metrics: Metrics) -> None:
    """Metrics are not for this writer."""

  def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
    self._records = [r for r in self._records if r["step"] != step]
    self._records.append({"step": step, "samples": [sample._asdict() for sample in samples]})
    atomic.write(self._path, "".join(strict_json.dumps(r) + "\n" for r in self._records))


def read_samples(folder: epath.PathLike) -> list[dict[str, Any]]:
  """The records of a run's samples, in the order of steps. [] without any.

  Raises:
    ValueError: The file is damaged.
  """
  path = epath.Path(folder) / SAMPLES
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


WRITERS.add("samples", Entry(Samples, wanted=lambda c: c.log.samples.every > 0))
