"""Causal and masked language modeling.

B batch, T position, V vocabulary.
"""

from typing import Any

import jax
import ml_collections

from jaxgpt.model.attention import qk_clip
from jaxgpt.model.transformer import Transformer
from jaxgpt.training import chunked_loss, losses
from jaxgpt.training.objectives.forward import apply, router_terms
from jaxgpt.training.objectives.objective import OBJECTIVES, Aux, Batch, LossFn, Objective
from jaxgpt.tree import PyTree


def _language_model(model: Transformer, c_objective: ml_collections.ConfigDict) -> LossFn:
  """Cross entropy of `targets`, weighted by `loss_weights`.

    loss = sum over tokens of loss_weights * ((1 - e) nll + e uniform + z_loss * log(Z)^2)

  with label smoothing e and z-loss, see `losses`. Targets that are the tokens shifted by one make
  it next-token prediction. Targets that masks hide make it masked language modeling (BERT,
  arXiv:1810.04805). Layers of experts add their router losses.

  Returns:
    A loss function. Its aux has 'nll', the loss without other terms, sums of the router, and the
    largest attention logits for QK-clip.
  """

  def sums(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Any]:
    """(loss, nll, the model's output)."""
    targets_BT, weights_BT = batch["targets"], batch["loss_weights"]
    z_loss, smoothing = c_objective.z_loss, c_objective.label_smoothing
    if c_objective.loss_chunk:
      options = chunked_loss.Options(
        c_objective.loss_chunk,
        model.cfg.logit_softcap,
        z_loss,
        model.cfg.grad_dtype == "float32",
        model.rules,
        smoothing,
      )
      project = lambda x, w, bias: chunked_loss.loss_sums(
        x, w, bias, targets_BT, weights_BT, options
      )
      out = apply(model, params, frozen, batch, key, project)
      return *out.logits, out
    out = apply(model, params, frozen, batch, key)
    nll_BT, log_z_BT = losses.cross_entropy(out.logits, targets_BT)
    mean_BT = out.logits.mean(-1) if smoothing else None
    return *losses.weighted_sums(nll_BT, log_z_BT, weights_BT, z_loss, smoothing, mean_BT), out

  def loss_fn(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Aux]:
    weight = batch["loss_weights"].sum()
    loss, nll, out = sums(params, frozen, batch, key)
    extra, aux = router_terms(model, out.router, weight)
    if model.largest_logits:
      aux = {**aux, qk_clip.LARGEST: out.largest_logits}
    return loss + extra, weight, {"nll": nll} | aux

  return loss_fn


OBJECTIVES.add(
  "causal_lm",
  Objective(
    _language_model,
    causal=True,
    loss_chunk=True,
    qk_clip=True,
    summary="predict the next token",
  ),
)
OBJECTIVES.add(
  "masked_lm",
  Objective(
    _language_model,
    layout="masked_lm",
    loss_chunk=True,
    qk_clip=True,
    summary="predict masked tokens",
  ),
)
