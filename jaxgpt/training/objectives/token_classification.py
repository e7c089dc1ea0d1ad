"""Classification of tokens, such as the tags of words.

B rows, T positions, C classes.
"""

import jax
import ml_collections

from jaxgpt.errors import UserError
from jaxgpt.model.transformer import Transformer
from jaxgpt.training import losses
from jaxgpt.training.objectives.forward import apply, router_terms
from jaxgpt.training.objectives.objective import OBJECTIVES, Aux, Batch, LossFn, Objective
from jaxgpt.tree import PyTree


def _token_classification(model: Transformer, c_objective: ml_collections.ConfigDict) -> LossFn:
  """Cross entropy of the class of each word, at the word's first token.

    loss = sum over tokens of loss_weights * (log sum over c of exp(x_c) - x_target)

  where x are the logits [B, T, C] of a token (BERT, arXiv:1810.04805, section 5.3). Other tokens
  than the first of a word have no weight, as with the label -100 of transformers'
  `BertForTokenClassification`. The weight of a batch is its number of words.

  Returns:
    A loss function. Its aux has 'nll' (the loss), 'correct' (words with the right class) and sums
    of the router.
  """
  del c_objective

  def loss_fn(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Aux]:
    out = apply(model, params, frozen, batch, key)
    targets_BT, weights_BT = batch["targets"], batch["loss_weights"]
    nll_BT, _ = losses.cross_entropy(out.logits, targets_BT)
    loss, weight = (nll_BT * weights_BT).sum(), weights_BT.sum()
    correct = ((out.logits.argmax(-1) == targets_BT) * weights_BT).sum()
    extra, of_router = router_terms(model, out.router, weight)
    return loss + extra, weight, {"nll": loss, "correct": correct} | of_router

  return loss_fn


def _check(c: ml_collections.ConfigDict) -> None:
  if c.model.head == "token_classifier" and c.model.num_labels < 2:
    raise UserError(
      f"objective.name={c.objective.name!r} needs model.num_labels of 2 or more, the classes of "
      f"the data (got {c.model.num_labels})"
    )


OBJECTIVES.add(
  "token_classification",
  Objective(
    _token_classification,
    layout="token_classification",
    head="token_classifier",
    check=_check,
    summary="predict the tag of each word",
  ),
)
