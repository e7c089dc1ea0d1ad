"""Checks that an objective can train the config's model on its data."""

import ml_collections

from jaxgpt.errors import UserError
from jaxgpt.training.objectives.objective import OBJECTIVES, Objective, find

# The output of a model by `model.head`, for messages.
HEADS = {
  "lm": "logits over the vocabulary",
  "classifier": "logits over classes",
  "token_classifier": "logits over classes for each token",
  "pooler": "one vector per row, not logits",
  "none": "hidden states, not logits",
}
_LOGITS = ("lm", "classifier", "token_classifier")  # heads with one meaning for each output


def head_problem(objective: Objective, c: ml_collections.ConfigDict) -> str:
  """The reason why a model's head gives an objective nothing to compare with its targets, or ''.

  Args:
    objective: The objective, from `find`.
    c: The config, resolved or not.
  """
  m, o = c.model, c.objective
  if m.head in objective.heads:
    return ""
  if m.head in ("none", "pooler"):
    return (
      f"model.head={m.head!r}: this model has no head, it gives {HEADS[m.head]}; start a model "
      "with a head from it: jaxgpt train --config=configs/finetune.py:RUN "
      f"--config.model.head={objective.heads[0]}"
    )
  fits = [name for name, entry in OBJECTIVES.items() if m.head in entry.heads]
  wanted = " or ".join(map(repr, objective.heads))
  return (
    f"objective.name={o.name!r} needs model.head={wanted}, not {m.head!r}, which gives "
    f"{HEADS[m.head]}; set model.head={wanted}, or objective.name to {' or '.join(fits)}"
  )


def check(c: ml_collections.ConfigDict, for_training: bool = True) -> None:
  """Checks that the objective can train the config's model on its data.

  Args:
    c: The config, resolved or not.
    for_training: False: the model is only used, so it may lack a head for the objective.

  Raises:
    UserError: There is no such objective, or the model or the data does not suit it.
  """
  objective, o, m = find(c), c.objective, c.model
  if objective.causal and not m.causal:
    raise UserError(
      f"objective.name={o.name!r} needs model.causal=True: otherwise each token attends to the one "
      "it predicts"
    )
  if o.loss_chunk and not objective.loss_chunk:
    names = " and ".join(name for name, entry in OBJECTIVES.items() if entry.loss_chunk)
    raise UserError(
      f"objective.loss_chunk={o.loss_chunk} is for {names}, not for objective.name={o.name!r}; set "
      "it to 0"
    )
  if c.optim.qk_clip and not objective.qk_clip:
    names = " and ".join(name for name, entry in OBJECTIVES.items() if entry.qk_clip)
    raise UserError(
      f"optim.qk_clip={c.optim.qk_clip} is for {names}, not for objective.name={o.name!r}; set it "
      "to 0"
    )
  if c.data.stream and objective.layout != "causal_lm":
    raise UserError(
      f"data.stream={c.data.stream!r} is for objective.name='causal_lm', not {o.name!r}; prepare "
      "the files with `jaxgpt data`"
    )
  # An imported model may have no head. It can be exported, and a training run can start from it.
  if (problem := head_problem(objective, c)) and (for_training or m.head in _LOGITS):
    raise UserError(problem)
  objective.check(c)
