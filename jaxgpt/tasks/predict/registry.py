"""The predictor of a run, by what it was trained for.

objective               model.head          a row's prediction
classification          classifier          label and probabilities, or a value
multi_label             classifier          labels and probabilities
token_classification    token_classifier    a tag for each word, and entities
question_answering      token_classifier    the answer and its place in the passage
contrastive             pooler, none        an embedding
causal_lm, preference   lm                  text
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import ml_collections

from jaxgpt.data import pipeline
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.tasks.predict import encoders, texts
from jaxgpt.tasks.predict.protocol import Predictor, Settings
from jaxgpt.text.prepare import shards
from jaxgpt.training import objectives

Maker: TypeAlias = Callable[[load.Run, str, Settings], Predictor]


class Entry(NamedTuple):
  """A predictor.

  Attributes:
    make: (run, kind of the rows, settings) -> the predictor.
    kinds: Kinds of rows that it takes.
    heads: `model.head` of the models that it serves.
  """

  make: Maker
  kinds: tuple[str, ...]
  heads: tuple[str, ...]


_WRITES = Entry(texts.Texts, ("text", "seq2seq", "chat"), ("lm",))
# Layout of the objective -> its predictor.
PREDICTORS = {
  "classification": Entry(encoders.Classes, ("classification",), ("classifier",)),
  "multi_label": Entry(encoders.LabelSets, ("multi_label",), ("classifier",)),
  "token_classification": Entry(encoders.Tags, ("tagging",), ("token_classifier",)),
  "question_answering": Entry(encoders.Answers, ("question_answering",), ("token_classifier",)),
  "retrieval": Entry(encoders.Embeddings, ("retrieval",), ("pooler", "none")),
  "causal_lm": _WRITES,
  "preference": _WRITES,
}


def make(run: load.Run, kind: str | None = None, settings: Settings | None = None) -> Predictor:
  """The predictor of a run.

  Args:
    run: From `load.load`. Its weights are not kept.
    kind: Kind of the rows. None: that of the run's data.
    settings: See `Settings`. None: the defaults.

  Raises:
    UserError: The run's model predicts nothing, or rows of another kind. Or as `Predictor.use`.
  """
  c = run.c
  found = _find(c)
  if found is None:
    raise UserError(
      f"this model (model.head={c.model.head!r}, objective.name={c.objective.name!r}) predicts "
      "nothing for a row; start a run from it that does, see docs/tasks.md"
    )
  kind = _kind_of(run, kind, found.kinds)
  return found.make(run._replace(params=None), kind, settings or Settings())


def _find(c: ml_collections.ConfigDict) -> Entry | None:
  """The predictor of a config's model, or None."""
  if c.model.head in ("pooler", "none"):
    return PREDICTORS["retrieval"]
  if c.model.head == "lm" and not c.model.causal:
    return None
  found = PREDICTORS.get(objectives.find(c).layout)
  return found if found is None or c.model.head in found.heads else None


def _kind_of(run: load.Run, asked: str | None, kinds: Sequence[str]) -> str:
  """The kind of the rows that a run predicts for."""
  if asked is not None:
    if asked not in kinds:
      raise UserError(
        f"--kind={asked}: this run predicts for rows of kind {' or '.join(kinds)}; leave it out"
        if len(kinds) == 1
        else f"--kind={asked}: choose one of {', '.join(kinds)}"
      )
    return asked
  if len(kinds) == 1:
    return kinds[0]
  found = _kinds_of_data(run)
  if len(found) == 1 and found <= set(kinds):
    return found.pop()
  if found & {"preference"} or (not run.c.data.path and run.generation.template):
    return "chat" if run.generation.template else "text"
  if not run.c.data.path:  # an imported model
    return "text"
  raise UserError(
    f"the form of the run's data is not known: data.path={run.c.data.path!r} "
    + (f"has the kinds {', '.join(sorted(found))}" if found else "is not there any more")
    + f"; say what a row is with --kind={'|'.join(kinds)}"
  )


def _kinds_of_data(run: load.Run) -> set[str]:
  if not run.c.data.path:
    return set()
  try:
    return {shards.read_manifest(f)["kind"] for f in pipeline.folders(run.c.data.path)}
  except UserError:
    return set()
