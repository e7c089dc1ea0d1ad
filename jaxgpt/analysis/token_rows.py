"""Rows of tokens: the text on which analyses read what a model computes.

Objectives that compare two texts have batches without them, such as {'chosen': …, 'rejected': …}.
Their models read other text as `causal_lm` lays it out.
"""

import ml_collections

from jaxgpt.analysis.compression.methods import UnsuitableError
from jaxgpt.data import layouts, pipeline
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.training import objectives

_TEXT = "a prepared folder of text in the same tokens"


def obstacle(c: ml_collections.ConfigDict) -> str:
  """The reason why batches of a config are no rows of tokens, or ''. `c` is resolved."""
  names = layouts.blank(objectives.find(c).layout, 1, 1, c.model.num_labels or 2)
  if "tokens" in names:
    return ""
  return f"its rows are pairs ({', '.join(names)}), not texts"


def as_causal_lm(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A copy of a config that reads text by itself, without a model to compare with."""
  c = c.copy_and_resolve_references()
  c.objective.update(dict(name="causal_lm", teacher="", teacher_config="", stored=""))
  return c


def reading(run: load.Run, data: str | None) -> load.Run:
  """The run as it reads other data: as causal_lm if its objective reads pairs.

  Args:
    run: From `load.load`.
    data: A prepared folder. None: the run's own data.
  """
  if not data or not (run.c.model.head == "lm" and run.c.model.causal and obstacle(run.c)):
    return run
  c = as_causal_lm(run.c)
  return run._replace(c=c, parts=run.parts._replace(objective=objectives.make(run.parts.model, c)))


def open_data(
  run: load.Run, split: str, batch_size: int | None = None, data: str | None = None
) -> tuple[ml_collections.ConfigDict, pipeline.Batches]:
  """Opens a split as `load.open_split` does, for commands without --config.

  Args:
    run: From `load.load`, or from `reading`.
    split: See `load.open_split`.
    batch_size: See `load.open_split`.
    data: See `load.open_split`.

  Raises:
    UserError: See `load.open_split`.
  """
  try:
    return load.open_split(run, split, batch_size, data)
  except layouts.KindError as e:  # it says to set objective.name, which is fixed here
    kinds = " or ".join(e.kinds)
    if data:
      raise UserError(
        f"--data={data}: {e.source!r} is of kind {e.kind}, and data of kind {kinds} is needed; "
        f"prepare it with --kind={e.kinds[0]}, or name another folder"
      ) from e
    raise UserError(
      f"the run's data {e.source!r} is of kind {e.kind}, and data of kind {kinds} is needed; name "
      f"{_TEXT} with --data=DIR"
    ) from e


def open_split(
  run: load.Run, split: str, batch_size: int | None = None, data: str | None = None
) -> tuple[ml_collections.ConfigDict, pipeline.Batches]:
  """Opens a split as rows of tokens.

  Args:
    run: From `load.load`.
    split: See `load.open_split`.
    batch_size: See `load.open_split`.
    data: See `load.open_split`.

  Raises:
    UserError: The run reads pairs, and `data` is None or the model is no language model. See also
      `load.open_split`.
  """
  run = reading(run, data)
  if problem := obstacle(run.c):
    name = f"objective.name={run.c.objective.name!r}"
    if run.c.model.head == "lm" and run.c.model.causal:
      raise UserError(f"{name}: {problem}; name {_TEXT} with --data=DIR")
    reason = f"{problem}, and the model reads no others"
    raise UnsuitableError(name, reason, "use a method that reads no text")
  return open_data(run, split, batch_size, data)
