"""The uses that a model has a head for: train, evaluate, generate and export.

A model's head, its objective and its attention (`model.causal`) decide together what the model can
be used for. Commands ask here before they load weights, and `jaxgpt import` recommends only the
commands that this module allows.
"""

import ml_collections

from jaxgpt.data import layouts
from jaxgpt.errors import UserError
from jaxgpt.training import objectives

USES = ("train", "evaluate", "generate", "export")


def obstacle(c: ml_collections.ConfigDict, use: str) -> str:
  """The reason why a model lacks a use, with the way out, or '' if it has the use.

  Args:
    c: The config of the model, resolved or not.
    use: One of `USES`. 'evaluate' means with the config's own objective.
  """
  m, o = c.model, c.objective
  if use == "export":  # depends on the family alone, see `hf.convert.family_of`
    return ""
  if use in ("train", "evaluate"):
    return objectives.head_problem(objectives.find(c), c)
  if m.head != "lm":
    gives = objectives.HEADS[m.head]
    return (
      f"model.head={m.head!r}: this model gives {gives}, and only model.head='lm' gives the logits "
      "of a next token; use a causal language model"
    )
  if not m.causal:
    return (
      "model.causal=False: this model reads the tokens on both sides of a token, so it cannot "
      "continue a text; use a causal language model"
    )
  layout = layouts.LAYOUTS[objectives.find(c).layout]
  if layout.needs_masking:
    return (
      f"objective.name={o.name!r}: this model was trained to fill in masked tokens, not to "
      "continue a text; use a model trained with objective.name='causal_lm'"
    )
  return ""


def check(c: ml_collections.ConfigDict, use: str) -> None:
  """Raises a UserError if a model lacks a use. See `obstacle`."""
  if problem := obstacle(c, use):
    raise UserError(problem)


def of(c: ml_collections.ConfigDict) -> list[str]:
  """The uses that a model has, in the order of `USES`."""
  return [use for use in USES if not obstacle(c, use)]
