"""Classification of rows into any number of classes.

B rows, C classes.
"""

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt.model.transformer import Transformer
from jaxgpt.training.objectives.forward import apply, router_terms
from jaxgpt.training.objectives.objective import OBJECTIVES, Aux, Batch, LossFn, Objective
from jaxgpt.tree import PyTree


def _multi_label(model: Transformer, c_objective: ml_collections.ConfigDict) -> LossFn:
  """Sigmoid cross entropy of `labels` [B, C], averaged over the classes.

  With logits x and labels y in {0, 1}, each class is a logistic regression of its own:

    loss of a row = mean over c of -(y_c log sigmoid(x_c) + (1 - y_c) log(1 - sigmoid(x_c)))
                  = mean over c of softplus(x_c) - y_c x_c

  It agrees with `problem_type="multi_label_classification"` of transformers, which is
  `torch.nn.BCEWithLogitsLoss`.

  Returns:
    A loss function. Its aux has 'nll' (the loss), sums of the router, and with a class taken as
    predicted where its probability is above 1/2: 'correct' (rows with exactly the right classes),
    and 'true_positives', 'predicted' and 'labelled', counts of classes over all rows. Micro-F1 is
    2 true_positives / (predicted + labelled).
  """
  del c_objective

  def loss_fn(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Aux]:
    out = apply(model, params, frozen, batch, key)
    x_BC, y_BC, weights_B = out.logits, batch["labels"], batch["loss_weights"]
    loss = ((jax.nn.softplus(x_BC) - y_BC * x_BC).mean(-1) * weights_B).sum()
    found_BC = (x_BC > 0).astype(y_BC.dtype)
    count = lambda x_BC: (x_BC.sum(-1) * weights_B).sum()
    aux = {
      "nll": loss,
      "correct": (jnp.all(found_BC == y_BC, axis=-1) * weights_B).sum(),
      "true_positives": count(found_BC * y_BC),
      "predicted": count(found_BC),
      "labelled": count(y_BC),
    }
    extra, of_router = router_terms(model, out.router, weights_B.sum())
    return loss + extra, weights_B.sum(), aux | of_router

  return loss_fn


OBJECTIVES.add(
  "multi_label",
  Objective(
    _multi_label,
    layout="multi_label",
    head="classifier",
    summary="predict any number of labels",
  ),
)
