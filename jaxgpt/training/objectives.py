"""What a step minimises. The train step and the loop know objectives only by their signature:

objective(params, frozen, batch, key) -> (weighted loss sum, weight sum, aux)

`params` are trained, `frozen` holds further parameters of the same tree that are not, `key` is the
step's PRNG key or None when evaluating, `aux` a dict of further sums that are reported per weight.

B batch, T position, V vocabulary.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxgpt.model import lora, moe
from jaxgpt.model.attention import token_order
from jaxgpt.training import chunked_loss
from jaxgpt.tree import PyTree, map_named, merge

# (params, frozen, batch, key) -> (weighted loss sum, weight sum, aux sums)
LossFn: TypeAlias = Callable[
  [PyTree, PyTree | None, PyTree, jax.Array | None],
  tuple[jax.Array, jax.Array, dict[str, jax.Array]],
]


@jax.custom_vjp
def cross_entropy(logits_BTV, targets_BT):
  """Negative log likelihood of each target, and the log of the softmax's normaliser.

  Args:
    logits_BTV: float32.
    targets_BT: token ids.

  Returns:
    (nll_BT, log_z_BT) in nats.
  """
  return _cross_entropy_fwd(logits_BTV, targets_BT)[0]


def _hit(logits_BTV, targets_BT):
  # A comparison fuses and stays local where V is sharded; a gather does neither.
  return jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]


def _cross_entropy_fwd(logits_BTV, targets_BT):
  top = logits_BTV.max(-1, keepdims=True)
  exp_BTV = jnp.exp(logits_BTV - top)
  z = exp_BTV.sum(-1, keepdims=True)
  log_z_BT = (jnp.log(z) + top)[..., 0]
  of_target_BT = jnp.where(_hit(logits_BTV, targets_BT), logits_BTV, 0).sum(-1)
  return (log_z_BT - of_target_BT, log_z_BT), (exp_BTV / z, targets_BT)


def _cross_entropy_bwd(saved, grads):
  probs_BTV, targets_BT = saved
  dnll, dlog_z = (g[..., None] for g in grads)
  return probs_BTV * (dnll + dlog_z) - jnp.where(_hit(probs_BTV, targets_BT), dnll, 0), None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def language_model(model, c_objective):
  """The likelihood of `targets`, weighted by `loss_weights`, with an optional z-loss.

  Next-token prediction where the targets are the tokens shifted by one, masked language modelling
  (BERT, arXiv:1810.04805) where they are what masks hide: the batch decides. z-loss adds
  z_loss * log(Z)^2 per token (PaLM, arXiv:2204.02311, section 5).

  Args:
    model: a `Transformer`.
    c_objective: the config's `objective` section.

  Returns:
    An objective. Its aux has 'nll', the loss without further terms, and `_router_terms`.
  """

  def sums(params, frozen, batch, key):
    """(loss, nll, the model's output)."""
    weights_BT = batch["loss_weights"]
    if c_objective.loss_chunk:
      terms = chunked_loss.Terms(
        c_objective.loss_chunk,
        model.cfg.logit_softcap,
        c_objective.z_loss,
        model.cfg.grad_dtype == "float32",
        model.rules,
      )
      project = lambda x, w, bias: chunked_loss.loss_sums(
        x, w, bias, batch["targets"], weights_BT, terms
      )
      out = _apply(model, params, frozen, batch, key, project)
      return *out.logits, out
    out = _apply(model, params, frozen, batch, key)
    nll_BT, log_z_BT = cross_entropy(out.logits, batch["targets"])
    nll = loss = (nll_BT * weights_BT).sum()
    if c_objective.z_loss:
      loss += c_objective.z_loss * (jnp.square(log_z_BT) * weights_BT).sum()
    return loss, nll, out

  def objective(params, frozen, batch, key):
    weights_BT = batch["loss_weights"]
    loss, nll, out = sums(params, frozen, batch, key)
    extra, aux = _router_terms(model.cfg.moe, out.router, weights_BT.sum())
    return loss + extra, weights_BT.sum(), {"nll": nll} | aux

  return objective


def classification(model, c_objective):
  """Cross entropy of `labels` [B], or with one label the squared error of a regression.

  Args and returns: as `language_model`; the aux has also 'correct' where there are classes.
  """
  del c_objective

  def objective(params, frozen, batch, key):
    out = _apply(model, params, frozen, batch, key)
    weights_B, labels_B = batch["loss_weights"], batch["labels"]
    if model.cfg.num_labels == 1:
      nll_B, aux = jnp.square(out.logits[:, 0] - labels_B), {}
    else:
      nll_B, _ = cross_entropy(out.logits, labels_B)
      aux = {"correct": ((out.logits.argmax(-1) == labels_B) * weights_B).sum()}
    loss = (nll_B * weights_B).sum()
    extra, of_router = _router_terms(model.cfg.moe, out.router, weights_B.sum())
    return loss + extra, weights_B.sum(), {"nll": loss} | aux | of_router

  return objective


def preference(model, c_objective):
  """Direct preference optimisation (arXiv:2305.18290, eq. 7): the chosen answer over the rejected.

  The reference model is the model itself without its adapters (LoRA), which are all that is
  trained. A row of `batch['chosen']` and of `batch['rejected']` is one pair.

  Args and returns: as `language_model`; a pair weighs 1. The aux has also 'correct': whether the
  adapters have raised the chosen answer more than the rejected one.
  """

  def log_likelihood(params, frozen, rows, key):
    out = _apply(model, params, frozen, rows, key)
    nll_BT, _ = cross_entropy(out.logits, rows["targets"])
    return -(nll_BT * rows["loss_weights"]).sum(-1)

  def objective(params, frozen, batch, key):
    without = jax.lax.stop_gradient(_without_adapters(params))
    gain_B = 0.0
    for sign, rows in ((1, batch["chosen"]), (-1, batch["rejected"])):
      gain_B += sign * (
        log_likelihood(params, frozen, rows, key) - log_likelihood(without, frozen, rows, None)
      )
    weights_B = batch["chosen"]["loss_weights"].max(-1)  # 0 in rows that only fill a batch up
    loss = (jax.nn.softplus(-c_objective.beta * gain_B) * weights_B).sum()
    return (
      loss,
      weights_B.sum(),
      {
        "nll": loss,
        "correct": ((gain_B > 0) * weights_B).sum(),
        "margin": (c_objective.beta * gain_B * weights_B).sum(),
      },
    )

  return objective


def _without_adapters(params):
  zero = lambda path, x: jnp.zeros_like(x) if path.endswith(lora.B) else x
  return map_named(zero, params)


def _apply(model, params, frozen, batch, key, project=None):
  return model.apply(
    {"params": merge(params, frozen)},
    batch["tokens"],
    batch["positions"],
    batch["segment_ids"],
    token_types_BT=batch.get("token_types"),
    dropout_key=key,
    balanced=True,
    project=project,
  )


def _router_terms(c_moe, stats, weight):
  """(what the router adds to the loss sum, its aux sums); nothing where there are no experts."""
  if stats is None:
    return 0.0, {}
  balance, z = moe.losses(stats)
  dropped = stats["dropped"] / jnp.maximum(stats["tokens"] * c_moe.per_token, 1)
  extra = c_moe.balance_loss * balance + c_moe.z_loss * z
  return extra * weight, {
    "router_balance": balance * weight,
    "router_z": z * weight,
    "dropped_share": dropped * weight,
  }


OBJECTIVES = {
  "causal_lm": language_model,
  "masked_lm": language_model,
  "classification": classification,
  "preference": preference,
}


def make(model, c_objective):
  """The objective that the config names, of batches whose tokens are in the order of their rows."""
  objective = OBJECTIVES[c_objective.name](model, c_objective)
  if not model.cfg.causal:
    return objective
  balanced = lambda x: token_order.balance(x) if x.ndim > 1 else x
  return lambda params, frozen, batch, key: objective(
    params, frozen, jax.tree.map(balanced, batch), key
  )
