"""The router of a mixture of experts: the experts of each token, and the losses that spread tokens.

B batch, T position, E experts, X experts of a token.
"""

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt.model import ops

# Sums over the tokens that are not padding, float32:
#   chosen   [E] tokens sent to each expert
#   scores   [E] router scores
#   z        log(sum(exp(logits)))^2
#   tokens   number of tokens
#   busiest  tokens sent to the expert that gets most. Summed over layers, each counts its own
#   dropped  pairs of a token and an expert that had no room for it
#   sent     pairs whose token went to another device, without a capacity
Statistics = dict[str, jax.Array]


def route(
  logits: jax.Array, bias: jax.Array | None, c_moe: ml_collections.FrozenConfigDict
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Chooses the experts of each token and their weights.

  Args:
    logits: float32 [..., E].
    bias: [E], added to the scores for the choice only (DeepSeek-V3, arXiv:2412.19437, section
      2.1.2), or None.
    c_moe: The config's `model.moe` section.

  Returns:
    (weights, experts, scores): float32 [..., X], int32 [..., X] and float32 [..., E].
  """
  scores = jax.nn.softmax(logits) if c_moe.router == "softmax" else jax.nn.sigmoid(logits)
  choice = scores if bias is None else scores + bias
  if c_moe.groups > 1:
    choice = _best_groups(choice, c_moe)
  _, experts = ops.few_largest(choice, c_moe.per_token)
  weights = jnp.take_along_axis(scores, experts, axis=-1)
  if c_moe.normalize:
    weights /= weights.sum(-1, keepdims=True) + 1e-20
  return weights * c_moe.scale, experts, scores


def _best_groups(choice: jax.Array, c_moe: ml_collections.FrozenConfigDict) -> jax.Array:
  """Scores with -inf outside the best groups of experts.

  A group is rated by its best expert in DeepSeek-V2 (softmax), by the sum of its best two in
  DeepSeek-V3 (sigmoid).
  """
  grouped = choice.reshape(*choice.shape[:-1], c_moe.groups, -1)
  best = ops.few_largest(grouped, 1 if c_moe.router == "softmax" else 2)[0].sum(-1)
  _, chosen = ops.few_largest(best, c_moe.top_groups)
  kept = jax.nn.one_hot(chosen, c_moe.groups).sum(-2) > 0
  return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)


def statistics(
  logits_BTE: jax.Array, scores_BTE: jax.Array, experts_BTX: jax.Array, real_BT: jax.Array
) -> Statistics:
  """The sums that the router losses are computed from: `Statistics` but 'dropped' and 'sent'.

  Args:
    logits_BTE: Router logits.
    scores_BTE: Router scores.
    experts_BTX: Experts of each token.
    real_BT: False for padding.
  """
  E = logits_BTE.shape[-1]
  real = real_BT.astype(jnp.float32)
  chosen_BTE = jax.nn.one_hot(experts_BTX, E).sum(-2)
  z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
  chosen_E = jnp.einsum("BT,BTE->E", real, chosen_BTE)
  return {
    "chosen": chosen_E,
    "busiest": chosen_E.max(),
    "scores": jnp.einsum("BT,BTE->E", real, scores_BTE),
    "z": (z_BT * real).sum(),
    "tokens": real.sum(),
  }


def losses(stats: Statistics) -> tuple[jax.Array, jax.Array]:
  """Router losses, from the statistics summed over all layers. Each is a mean of order 1.

  The balance loss is E * sum over experts e of (share of tokens sent to e * mean score of e)
  (Switch, arXiv:2101.03961, eq. 4, in the form of Hugging Face's `load_balancing_loss_func`). It is
  the number of experts per token if all are used equally, and larger otherwise. The z loss is
  arXiv:2202.08906, eq. 5.

  Returns:
    (balance loss, z loss).
  """
  tokens = jnp.maximum(stats["tokens"], 1)
  balance = (stats["chosen"] * stats["scores"]).sum() / tokens**2 * stats["chosen"].shape[-1]
  return balance, stats["z"] / tokens


def imbalance(stats: Statistics) -> jax.Array:
  """Tokens of the busiest expert over the mean of all experts, averaged over the layers.

  It is 1 if all experts are used equally, and E / X if all tokens go to the same X experts.

  Args:
    stats: Statistics, of a layer or summed over layers.
  """
  return stats["busiest"] / jnp.maximum(stats["chosen"].mean(), 1e-9)
