"""Evaluators: further metrics of a run's evaluations, such as a task's, given to the loop.
Samplers: texts that the model writes as training goes on.

The loop calls each of them in all processes, with the weights of the step, wherever it evaluates.
Commands pass their makers to `loop.train`, since the packages that define them come after this one.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import ml_collections
from etils import epath

from jaxgpt.run.metric_writers import Sample
from jaxgpt.text.tokenizers.tokenizer import Tokenizer
from jaxgpt.training import build
from jaxgpt.tree import PyTree


class Context(NamedTuple):
  """A run that is being trained.

  Attributes:
    c: The resolved config.
    folder: The run folder.
    mesh: The device mesh.
    parts: The model and everything that trains it.
    tokenizer: The data's tokenizer.
    data_digest: Digest of the data.
  """

  c: ml_collections.ConfigDict
  folder: epath.Path
  mesh: jax.sharding.Mesh
  parts: build.Parts
  tokenizer: Tokenizer
  data_digest: str


class Sampler(NamedTuple):
  """Writes texts as training goes on.

  Attributes:
    every: Steps between them.
    sample: f(all weights) -> the texts, the same in all processes.
  """

  every: int
  sample: Callable[[PyTree], list[Sample]]


# f(all weights) -> {metric: value}, the same in all processes.
Evaluator: TypeAlias = Callable[[PyTree], Mapping[str, float]]
# Makes an evaluator or a sampler, or None if the config asks for none. Raises a UserError for a bad
# setting.
EvaluatorMaker: TypeAlias = Callable[[Context], Evaluator | Sampler | None]
