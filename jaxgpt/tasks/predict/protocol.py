"""The protocol of predictors: rows in, predictions out, with the weights given at each call."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from jaxgpt.errors import UserError
from jaxgpt.inference.engine.requests import Beams, Constraint
from jaxgpt.inference.sampling import Sampling
from jaxgpt.tasks.predict.rows import Row
from jaxgpt.tree import PyTree

Prediction: TypeAlias = dict[str, Any]


class Settings(NamedTuple):
  """How a predictor works.

  Attributes:
    rows: Rows of a batch, on each device.
    max_new: Most tokens of a generated text.
    sampling: How its tokens are drawn.
    seed: Seed of the draws.
    constraint: The form of the texts, or None for any.
    beams: Search for a likely text in place of drawing one. Or None.
    tell: Called with the share of a chunk that is done, from 0 to 1.
    keep_weights: Keep a copy of the weights, in the form that decoding reads, for further calls
      with them.
  """

  rows: int = 32
  max_new: int = 200
  sampling: Sampling = Sampling(temperature=0.0)
  seed: int = 0
  constraint: Constraint | None = None
  keep_weights: bool = True
  beams: Beams | None = None
  tell: Callable[[float], None] = lambda share: None


class Predictor(Protocol):
  """Predicts for the rows of one chunk.

  Attributes:
    kind: The kind of the rows, a key of `KINDS`.
    classes: Names of the classes that it predicts, in the order of the model's outputs. Empty if it
      predicts something else.
  """

  kind: str
  classes: Sequence[str]

  def use(self, settings: Settings) -> None:
    """Goes on with other settings, of which `rows` and `keep_weights` are the same as before.

    Raises:
      UserError: The settings do not suit the predictor.
    """
    ...

  def __call__(
    self, params: PyTree, rows: Sequence[Row], chunk: int = 0
  ) -> list[Prediction | UserError]:
    """The prediction for each row, or the reason why there is none.

    Args:
      params: All weights, on the mesh.
      rows: Rows without a problem.
      chunk: Number of the chunk, which seeds random draws.
    """
    ...
