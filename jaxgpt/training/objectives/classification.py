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
  """Cross entropy of `labels` [B] with label smoothing, or with one label a squared error.

    loss = sum over rows of loss_weights * ((1 - e) nll + e uniform), see `losses`
    loss = sum over rows of loss_weights * (output - label)^2          of a regression

  Returns:
    A loss function. Its aux has 'nll', sums of the router, and 'correct' if there are classes, or
    'mse' and 'mae', the squared and the absolute error of a regression.
  """

  def loss_fn(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Aux]:
    out = apply(model, params, frozen, batch, key)
    weights_B, labels_B = batch["loss_weights"], batch["labels"]
    aux = {}
    if model.cfg.num_labels == 1:
      error_B = out.logits[:, 0] - labels_B
      loss = nll = aux["mse"] = (jnp.square(error_B) * weights_B).sum()
      aux["mae"] = (jnp.abs(error_B) * weights_B).sum()
    else:
      nll_B, log_z_B = losses.cross_entropy(out.logits, labels_B)
      smoothing = c_objective.label_smoothing
      mean_B = out.logits.mean(-1) if smoothing else None
      loss, nll = losses.weighted_sums(nll_B, log_z_B, weights_B, 0.0, smoothing, mean_B)
      aux["correct"] = ((out.logits.argmax(-1) == labels_B) * weights_B).sum()
    extra, of_router = router_terms(model, out.router, weights_B.sum())
    return loss + extra, weights_B.sum(), {"nll": nll} | aux | of_router

  return loss_fn


OBJECTIVES.add(
  "classification",
  Objective(_classification, layout="classification", head="classifier", summary="predict a label"),
)
