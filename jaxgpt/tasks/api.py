"""The Python interface: `model = jaxgpt.load(RUN)` and `model.predict(texts)`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from jaxgpt.inference import load as load_lib
from jaxgpt.inference import sampling
from jaxgpt.inference.engine.requests import Beams, Constraint
from jaxgpt.parallel import mesh
from jaxgpt.tasks.predict import job, registry, rows
from jaxgpt.tasks.predict.protocol import Prediction, Predictor, Settings


@dataclasses.dataclass
class Model:
  """A trained model in use.

  Example:
    >>> model = jaxgpt.load("runs/sentiment")
    >>> model.predict(["What a film!"])
    [{'label': 'good', 'probabilities': {'bad': 0.002, 'good': 0.998}}]

  Attributes:
    run: The run, with its config, weights and tokenizer.
  """

  run: load_lib.Run

  def __post_init__(self) -> None:
    self._predictors: dict[Any, Predictor] = {}

  def predict(
    self,
    values: Sequence[str | Mapping[str, Any]],
    *,
    kind: str | None = None,
    batch_size: int = 32,
    max_new: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
    constraint: Constraint | None = None,
    beams: Beams | None = None,
  ) -> list[Prediction]:
    """Predicts for texts, or for rows with columns. `jaxgpt predict` writes the same to a file.

    Args:
      values: Texts, or {column: value} with the columns that `jaxgpt data` takes.
      kind: Kind of the rows. None: that of the run's data.
      batch_size: Rows of a batch, on each device.
      max_new: Most tokens of a generated text.
      temperature: Of generated texts. 0: always the most likely token.
      seed: Seed of the draws.
      constraint: Form of generated texts: `jaxgpt.Constraint.of_schema({"type": "object"})`. None:
        any.
      beams: Search for a likely text with several beams: `jaxgpt.Beams(4)`. None: draw tokens.

    Returns:
      A prediction for each, in their order. One that can't be predicted for is {'error': why}.

    Raises:
      UserError: The run predicts nothing, or rows of another kind.
    """
    values = [values] if isinstance(values, str) else values
    draws = sampling.Sampling(temperature=temperature)
    settings = Settings(batch_size, max_new, draws, seed, constraint, beams=beams)
    key = (kind, batch_size)  # what a predictor is compiled for
    if key in self._predictors:
      self._predictors[key].use(settings)
    else:
      self._predictors[key] = registry.make(self.run, kind, settings)
    found = self._predictors[key]
    given = rows.of_values(values, found.kind)
    return [
      prediction
      for number, chunk in enumerate(job.chunks(given))
      for prediction in job.predict_rows(found, self.run.params, chunk, number)
    ]


def load(folder: epath.PathLike, step: int | str | None = None) -> Model:
  """Loads a run for use. Available as `jaxgpt.load`.

  Args:
    folder: The run folder, of `jaxgpt train` or `jaxgpt import`.
    step: Step of the checkpoint, or 'best'. None: the newest.

  Raises:
    UserError: There is no such run or checkpoint.
  """
  mesh.avoid_wrong_sums()
  return Model(load_lib.load(folder, step))
