"""Preferences: learning which of two answers is the better one.

B pairs of a batch, T position, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxgpt.model import fixed_models, lora
from jaxgpt.model.transformer import Transformer
from jaxgpt.training import losses
from jaxgpt.training.objectives.forward import apply, router_terms
from jaxgpt.training.objectives.objective import OBJECTIVES, Aux, Batch, LossFn, Objective, Stored
from jaxgpt.tree import PyTree, map_named, merge

SIDES = ("chosen", "rejected")


class Answers(NamedTuple):
  """One side of the pairs.

  Attributes:
    log_p_B: log p(answer | prompt) under the model: a sum over the answer's tokens.
    reference_B: The same under the reference. 0 for losses without a reference.
    length_B: Tokens of the answer, at least 1.
  """

  log_p_B: jax.Array
  reference_B: jax.Array | float
  length_B: jax.Array

  @property
  def gain_B(self) -> jax.Array:
    """log p(answer) - log p_reference(answer)."""
    return self.log_p_B - self.reference_B


class Compared(NamedTuple):
  """A loss of some pairs.

  Attributes:
    loss_B: The loss.
    difference_B: The chosen answer's score minus the rejected one's, as the loss compares them.
  """

  loss_B: jax.Array
  difference_B: jax.Array


PairLoss = Callable[[Answers, Answers, ml_collections.ConfigDict], Compared]


def dpo(chosen: Answers, rejected: Answers, o: ml_collections.ConfigDict) -> Compared:
  """Direct preference optimization (arXiv:2305.18290, eq. 7).

    loss = -log sigmoid(beta (gain of chosen - gain of rejected))

  where gain = log p(answer) - log p_reference(answer), summed over the answer's tokens.
  """
  difference_B = chosen.gain_B - rejected.gain_B
  return Compared(jax.nn.softplus(-o.beta * difference_B), difference_B)


def dpo_norm(chosen: Answers, rejected: Answers, o: ml_collections.ConfigDict) -> Compared:
  """Length-normalized DPO (Tülu 3, arXiv:2411.15124, eq. 6).

  loss = -log sigmoid(beta (gain of chosen / its length - gain of rejected / its length))
  """
  difference_B = chosen.gain_B / chosen.length_B - rejected.gain_B / rejected.length_B
  return Compared(jax.nn.softplus(-o.beta * difference_B), difference_B)


def ipo(chosen: Answers, rejected: Answers, o: ml_collections.ConfigDict) -> Compared:
  """Identity preference optimization (arXiv:2310.12036, eq. 17), per token as TRL has it.

    loss = (gain of chosen / its length - gain of rejected / its length - 1 / (2 beta))^2

  beta is the paper's tau. The paper does not divide by the length. TRL does, and says that its
  authors' results were made so.
  """
  difference_B = chosen.gain_B / chosen.length_B - rejected.gain_B / rejected.length_B
  return Compared(jnp.square(difference_B - 1 / (2 * o.beta)), difference_B)


def orpo(chosen: Answers, rejected: Answers, o: ml_collections.ConfigDict) -> Compared:
  """Odds ratio preference optimization (arXiv:2403.07691, eq. 6 and 7), without a reference.

    loss = -log p(chosen) / its length - beta log sigmoid(log odds of chosen - log odds of rejected)

  where odds = p / (1 - p) of p = exp(log p(answer) / its length). beta is the paper's lambda.
  """
  log_odds = lambda mean_B: mean_B - _log1mexp(mean_B)
  chosen_B, rejected_B = (side.log_p_B / side.length_B for side in (chosen, rejected))
  difference_B = log_odds(chosen_B) - log_odds(rejected_B)
  return Compared(-chosen_B + o.beta * jax.nn.softplus(-difference_B), difference_B)


def simpo(chosen: Answers, rejected: Answers, o: ml_collections.ConfigDict) -> Compared:
  """Simple preference optimization (arXiv:2405.14734, eq. 6), without a reference.

  loss = -log sigmoid(beta (log p(chosen) / its length - log p(rejected) / its length) - gamma)
  """
  difference_B = chosen.log_p_B / chosen.length_B - rejected.log_p_B / rejected.length_B
  return Compared(jax.nn.softplus(o.gamma - o.beta * difference_B), difference_B)


def _log1mexp(x: jax.Array) -> jax.Array:
  """log(1 - exp(x)) for x <= 0. Finite, with a finite gradient, where x is 0 to rounding."""
  x = jnp.minimum(x, -1e-6)
  near_0 = x > -0.693
  small, large = jnp.where(near_0, x, -1.0), jnp.where(near_0, -1.0, x)
  return jnp.where(near_0, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))


# Values of `objective.loss`, whose choices the key lists.
LOSSES: dict[str, PairLoss] = {
  "dpo": dpo,
  "dpo_norm": dpo_norm,
  "ipo": ipo,
  "orpo": orpo,
  "simpo": simpo,
}
WITHOUT_REFERENCE = ("orpo", "simpo")


def reference_of(params: PyTree, frozen: PyTree | None) -> PyTree:
  """All weights that training started from: those copied, those shared, and adapters turned off.

  Args:
    params: The trained parameters. They must not be the ones that a gradient is taken for.
    frozen: The other parameters, with the copies under 'reference', see `model.fixed_models`.
  """
  own, fixed = fixed_models.split(merge(params, frozen))
  own = _replaced(own, fixed.get(fixed_models.REFERENCE, {}))
  zero = lambda path, x: jnp.zeros_like(x) if path.endswith(lora.B) else x
  return map_named(zero, own)


def _replaced(tree: PyTree, new: PyTree) -> PyTree:
  """A nested dict with the leaves of another one in place of its own."""
  both = {k: _replaced(tree[k], new[k]) if isinstance(new[k], dict) else new[k] for k in new}
  return {**tree, **both}


def _log_p_B(logits_BTV: jax.Array, answers: Batch) -> jax.Array:
  """log p(answer | prompt) of each row."""
  nll_BT, _ = losses.cross_entropy(logits_BTV, answers["targets"])
  return -(nll_BT * answers["loss_weights"]).sum(-1)


def _stored(
  model: Transformer, c_objective: ml_collections.ConfigDict
) -> Callable[[PyTree, Batch], dict[str, jax.Array]]:
  """The reference's log-likelihoods of both answers."""
  del c_objective
  return lambda params, batch: {
    f"reference_{name}": _log_p_B(apply(model, params, None, batch[name], None).logits, batch[name])
    for name in SIDES
  }


def _preference(model: Transformer, c_objective: ml_collections.ConfigDict) -> LossFn:
  """The loss `objective.loss` of pairs, see `LOSSES`.

  Row i of `batch['chosen']` and of `batch['rejected']` are the two answers to one prompt. A pair
  has weight 1, or 0 if one of its answers has no token left within the context. The reference is
  the model before the first step. A batch with `reference_chosen` and `reference_rejected` [B]
  brings its log-likelihoods.

  Returns:
    A loss function. Its aux has 'nll' (the loss), 'correct' (the chosen answer scores higher),
    'margin' (beta times the difference of the scores), and if the reference is computed 'kl': per
    pair the mean over the tokens of both answers of KL(model || reference) in nats, over the whole
    vocabulary.
  """
  pair_loss = LOSSES[c_objective.loss]
  compares = c_objective.loss not in WITHOUT_REFERENCE

  def loss_fn(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Aux]:
    stored = compares and f"reference_{SIDES[0]}" in batch
    reference = None
    if compares and not stored:
      reference = jax.lax.stop_gradient(reference_of(params, frozen))
    sides, kl_sums, routers = [], [], []
    for name in SIDES:
      answers = batch[name]
      weights_BT = answers["loss_weights"]
      length_B = jnp.maximum(weights_BT.sum(-1), 1)
      out = apply(model, params, frozen, answers, key)
      routers.append(out.router)
      theirs_B: jax.Array | float = batch[f"reference_{name}"] if stored else 0.0
      if reference is not None:
        theirs = apply(model, reference, None, answers, None).logits
        theirs_B = _log_p_B(theirs, answers)
        kl_BT = losses.kl(jax.lax.stop_gradient(out.logits), theirs)
        kl_sums.append((kl_BT * weights_BT).sum(-1))
      sides.append(Answers(_log_p_B(out.logits, answers), theirs_B, length_B))
    loss_B, difference_B = pair_loss(sides[0], sides[1], c_objective)
    # 0 in rows of padding
    weights_B = jnp.minimum(*(batch[name]["loss_weights"].max(-1) for name in SIDES))
    loss = (loss_B * weights_B).sum()
    aux = {
      "nll": loss,
      "correct": ((difference_B > 0) * weights_B).sum(),
      "margin": (c_objective.beta * difference_B * weights_B).sum(),
    }
    if kl_sums:
      aux["kl"] = (sum(kl_sums) / (sides[0].length_B + sides[1].length_B) * weights_B).sum()
    if not model.cfg.lora.rank:  # adapters leave the routers as they are
      for stats in routers:
        extra, of_router = router_terms(model, stats, weights_B.sum() / len(SIDES))
        loss += extra
        aux |= {name: aux.get(name, 0) + value for name, value in of_router.items()}
    return loss, weights_B.sum(), aux

  return loss_fn


def _fixed(c: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The reference, for the losses that have one, unless its log-likelihoods are stored."""
  needless = c.objective.loss in WITHOUT_REFERENCE or c.objective.stored
  return () if needless else (fixed_models.REFERENCE,)


OBJECTIVES.add(
  "preference",
  Objective(
    _preference,
    layout="preference",
    sequences=len(SIDES),
    causal=True,
    fixed=_fixed,
    stored=Stored(
      _stored, lambda c: {f"reference_{name}": ((), np.float32) for name in SIDES}, evaluates=True
    ),
    summary="prefer the better answer: DPO, IPO, ORPO, SimPO",
  ),
)
