"""The interface of a metric writer, and the registry of those that a config can turn on."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import ml_collections
from etils import epath

from jaxgpt.config.registry import Registry

Metrics: TypeAlias = Mapping[str, float]


class Sample(NamedTuple):
  """A text that the model wrote during training.

  Attributes:
    prompt: The text that it continues.
    text: What it wrote.
  """

  prompt: str
  text: str


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

  def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
    """Takes texts that the model wrote. A writer that has no place for them does nothing.

    Args:
      step: Updates so far.
      samples: One for each of `log.samples.prompts`.
    """

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
