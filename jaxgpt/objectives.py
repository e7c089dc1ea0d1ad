"""What a step minimises. The train step and the loop know objectives only by their signature:

objective(params, frozen, batch, key) -> (weighted loss sum, weight sum, aux)

`params` are trained, `frozen` holds further parameters of the same tree that are not, `key` is the
step's PRNG key or None when evaluating, `aux` a dict of further sums that are reported per weight.

B batch, T position, V vocabulary.
"""

import jax
import jax.numpy as jnp

from jaxgpt.tree import merge


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


def causal_lm(model, c_objective):
  """Next-token prediction, weighted by `loss_weights`, with an optional z-loss.

  z-loss adds z_loss * log(Z)^2 per token (PaLM, arXiv:2204.02311, section 5).

  Args:
    model: a `Transformer`.
    c_objective: the config's `objective` section.

  Returns:
    An objective. Its aux has 'nll': the loss without the z-loss.
  """
  def objective(params, frozen, batch, key):
    logits_BTV, _ = model.apply({"params": merge(params, frozen)}, batch["tokens"],
                                batch["positions"], batch["segment_ids"], dropout_key=key)
    nll_BT, log_z_BT = cross_entropy(logits_BTV, batch["targets"])
    weights_BT = batch["loss_weights"]
    nll = (nll_BT * weights_BT).sum()
    loss = nll
    if c_objective.z_loss:
      loss += c_objective.z_loss * (jnp.square(log_z_BT) * weights_BT).sum()
    return loss, weights_BT.sum(), {"nll": nll}

  return objective


OBJECTIVES = {"causal_lm": causal_lm}


def make(model, c_objective):
  """The objective that the config names."""
  return OBJECTIVES[c_objective.name](model, c_objective)
