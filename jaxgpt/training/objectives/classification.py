"""Classification of rows, and regression."""

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt.model.transformer import Transformer
from jaxgpt.training import losses
from jaxgpt.training.objectives.forward import apply, router_terms
from jaxgpt.training.objectives.objective import OBJECTIVES, Aux, Batch, LossFn, Objective
from jaxgpt.tree import PyTree


def _classification(model: Transformer, c_objective: ml_collections.ConfigDict) -> LossFn:
  """Cross entropy of `labels` [B], or with one label the squared error of a regression.

  Returns:
    A loss function. Its aux has 'nll', sums of the router, and 'correct' if there are classes, or
    'mse' and 'mae', the squared and the absolute error of a regression.
  """
  del c_objective

  def loss_fn(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Aux]:
    out = apply(model, params, frozen, batch, key)
    weights_B, labels_B = batch["loss_weights"], batch["labels"]
    aux = {}
    if model.cfg.num_labels == 1:
      error_B = out.logits[:, 0] - labels_B
      loss_B = jnp.square(error_B)
      aux["mse"] = (loss_B * weights_B).sum()
      aux["mae"] = (jnp.abs(error_B) * weights_B).sum()
    else:
      loss_B, _ = losses.cross_entropy(out.logits, labels_B)
      aux["correct"] = ((out.logits.argmax(-1) == labels_B) * weights_B).sum()
    loss = (loss_B * weights_B).sum()
    extra, of_router = router_terms(model, out.router, weights_B.sum())
    return loss + extra, weights_B.sum(), {"nll": loss} | aux | of_router

  return loss_fn


OBJECTIVES.add(
  "classification",
  Objective(_classification, layout="classification", head="classifier", summary="predict a label"),
)
