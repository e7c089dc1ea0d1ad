"""Preferences: learning which of two answers is the better one."""

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt.errors import UserError
from jaxgpt.model import lora
from jaxgpt.model.transformer import Transformer
from jaxgpt.training import losses
from jaxgpt.training.objectives.forward import apply
from jaxgpt.training.objectives.objective import OBJECTIVES, Aux, Batch, LossFn, Objective
from jaxgpt.tree import PyTree, map_named


def _preference(model: Transformer, c_objective: ml_collections.ConfigDict) -> LossFn:
  """Direct preference optimization (arXiv:2305.18290, eq. 7).

  loss = -log sigmoid(beta * (gain of the chosen answer - gain of the rejected answer)), where gain
  is log p_model(answer) - log p_reference(answer). The reference is the model without its adapters
  (LoRA), which are all that is trained. Row i of `batch['chosen']` and of `batch['rejected']` are
  the two answers to one prompt, with weight 1.

  Returns:
    A loss function. Its aux has 'nll' (the loss), 'correct' (the chosen answer gained more) and
    'margin' (beta times the difference of the gains).
  """

  def log_likelihood_B(
    params: PyTree, frozen: PyTree | None, answers: Batch, key: jax.Array | None
  ) -> jax.Array:
    out = apply(model, params, frozen, answers, key)
    nll_BT, _ = losses.cross_entropy(out.logits, answers["targets"])
    return -(nll_BT * answers["loss_weights"]).sum(-1)

  def loss_fn(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Aux]:
    reference = jax.lax.stop_gradient(_without_adapters(params))
    margin_B: jax.Array | float = 0.0
    for sign, answers in ((1, batch["chosen"]), (-1, batch["rejected"])):
      margin_B += sign * (
        log_likelihood_B(params, frozen, answers, key)
        - log_likelihood_B(reference, frozen, answers, None)
      )
    weights_B = batch["chosen"]["loss_weights"].max(-1)  # 0 in rows of padding
    loss = (jax.nn.softplus(-c_objective.beta * margin_B) * weights_B).sum()
    aux = {
      "nll": loss,
      "correct": ((margin_B > 0) * weights_B).sum(),
      "margin": (c_objective.beta * margin_B * weights_B).sum(),
    }
    return loss, weights_B.sum(), aux

  return loss_fn


def _without_adapters(params: PyTree) -> PyTree:
  """The parameters with the second LoRA matrices set to 0, which turns the adapters off."""
  zero = lambda path, x: jnp.zeros_like(x) if path.endswith(lora.B) else x
  return map_named(zero, params)


def _check_adapters(c: ml_collections.ConfigDict) -> None:
  if not c.model.lora.rank:
    raise UserError(
      f"objective.name={c.objective.name!r} compares the model with itself without adapters: set "
      "model.lora.rank, such as 16"
    )


OBJECTIVES.add(
  "preference",
  Objective(
    _preference,
    layout="preference",
    causal=True,
    adapters_only=True,
    check=_check_adapters,
    summary="DPO of adapters",
  ),
)
