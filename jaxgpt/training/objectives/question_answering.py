"""Extractive question answering: the first and the last token of the answer in a passage.

B rows, T positions.
"""

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt.errors import UserError
from jaxgpt.model.transformer import Transformer
from jaxgpt.training.objectives.forward import apply, router_terms
from jaxgpt.training.objectives.objective import OBJECTIVES, Aux, Batch, LossFn, Objective
from jaxgpt.tree import PyTree

START, END = 0, 1  # outputs of the model


def _question_answering(model: Transformer, c_objective: ml_collections.ConfigDict) -> LossFn:
  """Cross entropy of the answer's first and last token, over the tokens of the row.

    loss of a row = (nll(start) + nll(end)) / 2,   nll(p) = log sum over t of exp(x_t) - x_p

  where x are the logits of all tokens for output 0 (start) or 1 (end), padding excluded (BERT,
  arXiv:1810.04805, section 4.2). A row without the answer has both at its first token (section
  4.3). It agrees with transformers' `BertForQuestionAnswering` for rows without padding, which
  that class counts among the candidates.

  The ends of the answer are marked in [B, T] and are not indices, so the tokens of a row may be in
  any order.

  Returns:
    A loss function. Its aux has 'nll' (the loss), 'correct' (rows whose two ends are both found)
    and sums of the router.
  """
  del c_objective

  def loss_fn(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Aux]:
    out = apply(model, params, frozen, batch, key)
    real_BT, weights_B = batch["segment_ids"] != 0, batch["loss_weights"]
    nll_B: jax.Array | float = 0.0
    found_B = weights_B > 0
    for output, marks_BT in ((START, batch["starts"]), (END, batch["ends"])):
      x_BT = out.logits[..., output]
      # Rows of padding have no candidates. With all of them, their loss is finite and has weight 0.
      candidates_BT = real_BT | ~real_BT.any(-1, keepdims=True)
      log_z_B = jax.nn.logsumexp(x_BT, axis=-1, where=candidates_BT)
      of_mark_B = (x_BT * marks_BT).sum(-1)
      nll_B += (log_z_B - of_mark_B) / 2
      best_B = jnp.where(candidates_BT, x_BT, -jnp.inf).max(-1)
      found_B &= of_mark_B >= best_B
    loss, weight = (nll_B * weights_B).sum(), weights_B.sum()
    extra, of_router = router_terms(model, out.router, weight)
    correct = (found_B * weights_B).sum()
    return loss + extra, weight, {"nll": loss, "correct": correct} | of_router

  return loss_fn


def _check(c: ml_collections.ConfigDict) -> None:
  m = c.model
  if m.head == "token_classifier" and (m.num_labels != 2 or m.label_names):
    raise UserError(
      f"objective.name={c.objective.name!r} needs model.num_labels=2, the start and the end of an "
      f"answer, and no model.label_names (got {m.num_labels} and {m.label_names!r})"
    )


OBJECTIVES.add(
  "question_answering",
  Objective(
    _question_answering,
    layout="question_answering",
    head="token_classifier",
    check=_check,
    summary="find an answer in a passage",
  ),
)
