"""Losses of preferences: by their equations, pair by pair, and with a reference that stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config, tree
from jaxgpt.config.keys import KEYS
from jaxgpt.errors import UserError
from jaxgpt.model import fixed_models
from jaxgpt.training import build, objectives
from jaxgpt.training.objectives import preference
from tests.training.objectives import models

# (tokens of the row, first learned) of each answer: pairs of unequal lengths, and a row of padding.
CHOSEN, REJECTED = [(8, 3), (5, 2), (8, 6), (0, 0)], [(5, 3), (8, 2), (8, 5), (0, 0)]
BETA, GAMMA = 0.7, 0.3


@pytest.fixture(scope="module")
def setup():
  """(trained weights, frozen weights with the reference, batch, values of each answer).

  The values of an answer: log p(answer), the same of the reference, its length, KL(model ||
  reference) summed over its tokens, and the gradient of the first.
  """
  model, params, reference = models.Bigram(), models.bigram(0), models.bigram(1)
  batch = {
    side: models.rows(seed, [[s] if s[0] else [] for s in spans])
    for seed, (side, spans) in enumerate({"chosen": CHOSEN, "rejected": REJECTED}.items())
  }

  def answer(side, row, end, first):
    """The values of one answer alone, without padding."""

    def log_p(params):
      logp_TV = jax.nn.log_softmax(models.logits(model, params, batch[side], row, 0, end))[first:]
      targets_T = batch[side]["targets"][row, first:end]
      return logp_TV[np.arange(end - first), targets_T].sum(), logp_TV

    (value, logp_TV), grad = jax.value_and_grad(log_p, has_aux=True)(params)
    theirs, theirs_TV = log_p(reference)
    kl = (jnp.exp(logp_TV) * (logp_TV - theirs_TV)).sum()
    return float(value), float(theirs), end - first, float(kl), grad

  answers = [
    [answer(side, row, *spans[row]) for side, spans in zip(batch, (CHOSEN, REJECTED))]
    for row in range(3)
  ]
  return params, {fixed_models.REFERENCE: reference}, batch, answers


def by_definition(loss, c, rc, nc, r, rr, nr):
  """(loss, score difference) of log-likelihoods, those of the reference, and lengths."""
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  odds = lambda p: p / (1 - p)
  if loss == "dpo":
    d = (c - rc) - (r - rr)
  elif loss in ("dpo_norm", "ipo"):
    d = (c - rc) / nc - (r - rr) / nr
  elif loss == "orpo":
    d = np.log(odds(np.exp(c / nc)) / odds(np.exp(r / nr)))
  else:
    d = c / nc - r / nr
  return {
    "ipo": (d - 1 / (2 * BETA)) ** 2,
    "orpo": -c / nc - BETA * np.log(sigmoid(d)),
    "simpo": -np.log(sigmoid(BETA * d - GAMMA)),
  }.get(loss, -np.log(sigmoid(BETA * d))), d


def value_and_grad(loss, params, frozen, batch):
  """((loss, (weight, aux)), gradient) of `preference`."""
  c = config.base()
  c.objective.update(dict(name="preference", loss=loss, beta=BETA, gamma=GAMMA))
  loss_fn = objectives.OBJECTIVES["preference"].loss_fn(models.Bigram(), c.objective)

  def summed(params):
    loss, weight, aux = loss_fn(params, frozen, batch, None)
    return loss, (weight, aux)

  return jax.value_and_grad(summed, has_aux=True)(params)


@pytest.mark.parametrize("loss", preference.LOSSES)
def test_loss_and_gradient_are_those_of_the_equation(setup, loss):
  """Each answer alone and without padding gives what the padded batch gives."""
  params, frozen, batch, answers = setup
  (got, (weight, aux)), grads = value_and_grad(loss, params, frozen, batch)
  numbers = np.array([[answer[:4] for answer in pair] for pair in answers])
  (c, rc, nc, kl_c), (r, rr, nr, kl_r) = numbers.transpose(1, 2, 0)
  f = lambda c, r: by_definition(loss, c, rc, nc, r, rr, nr)
  want_B, d_B = f(c, r)
  e = 1e-5  # central differences of the equation, chained with each answer's gradient
  dc_B = (f(c + e, r)[0] - f(c - e, r)[0]) / (2 * e)
  dr_B = (f(c, r + e)[0] - f(c, r - e)[0]) / (2 * e)
  factors = np.stack([dc_B, dr_B], 1).reshape(-1)
  of_answers = [answer[4] for pair in answers for answer in pair]
  want_grads = jax.tree.map(lambda *g: sum(map(np.multiply, factors, g)), *of_answers)
  assert weight == 3 and float(got) == pytest.approx(want_B.sum(), rel=1e-5)
  assert aux["correct"] == (d_B > 0).sum() and aux["nll"] == got
  assert float(aux["margin"]) == pytest.approx(BETA * d_B.sum(), rel=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, want_grads
  )
  if loss in preference.WITHOUT_REFERENCE:
    assert "kl" not in aux
  else:
    kl = ((kl_c + kl_r) / (nc + nr)).sum()
    assert float(aux["kl"]) == pytest.approx(kl, rel=1e-4) and kl > 0.01


@pytest.mark.slow
def test_other_pairs_of_a_batch_change_no_pairs_loss(setup):
  params, frozen, batch, _ = setup
  of_rows = lambda rows: jax.tree.map(lambda x: x[np.array(rows)], batch)
  loss = lambda rows: float(value_and_grad("ipo", params, frozen, of_rows(rows))[0][0])
  assert loss([0, 1, 2, 3]) == pytest.approx(loss([3, 0]) + loss([1, 3, 2]), rel=1e-5)


def test_stored_likelihoods_give_the_same_loss(setup):
  params, frozen, batch, answers = setup
  theirs = {
    f"reference_{side}": jnp.array([a[i][1] for a in answers] + [0.0])
    for i, side in enumerate(preference.SIDES)
  }
  (got, (_, aux)), grads = value_and_grad("dpo", params, None, batch | theirs)
  (want, _), want_grads = value_and_grad("dpo", params, frozen, batch)
  assert float(got) == pytest.approx(float(want), rel=1e-5) and "kl" not in aux
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, want_grads
  )


def test_the_reference_is_what_is_trained_before_the_first_step():
  """Frozen weights are shared, adapters are off, and all others are copied."""
  paths = lambda state: set(
    tree.flatten(fixed_models.split(state.get("frozen"))[1].get(fixed_models.REFERENCE, {}))
  )
  lora = dict(model__lora__rank=2, model__lora__targets=("q",), objective__name="preference")
  assert paths(models.make(**lora)[3]) == set()
  patterns = ("final_norm*", "*_lora_?")
  _, _, _, state = models.make(**lora, optim__trainable=patterns)
  copied = paths(state)
  assert copied and all(path.startswith("final_norm") for path in copied)
  params = models.moved(state["params"])
  found = tree.flatten(preference.reference_of(params, state["frozen"]))
  for path, x in tree.flatten(tree.merge(state["params"], state["frozen"])).items():
    if not path.startswith(fixed_models.REFERENCE) and not path.endswith("q_lora_a"):
      np.testing.assert_array_equal(found.pop(path), 0 * x if path.endswith("q_lora_b") else x)
  assert [*found] == ["layers/attn/q_lora_a"], "its product with 0 is 0"
  _, _, _, state = models.make(objective__name="preference", objective__loss="simpo")
  assert "frozen" not in state


def test_an_answer_that_is_certain_has_finite_odds():
  certain = preference.Answers(jnp.zeros(1), 0.0, jnp.ones(1))
  c = config.base()
  f = lambda log_p: preference.orpo(
    certain._replace(log_p_B=log_p), certain, c.objective
  ).loss_B.sum()
  value, grad = jax.value_and_grad(f)(jnp.zeros(1))
  assert np.isfinite(value) and np.isfinite(grad).all()


def test_losses_are_the_choices_of_the_key():
  assert tuple(preference.LOSSES) == tuple(KEYS["objective.loss"].choices)
  c = config.base()
  c.objective.update(dict(name="preference", loss="dop"))
  with pytest.raises(UserError, match="objective.loss='dop': did you mean 'dpo'"):
    config.resolve(c, vocab_size=8)
  build.check(c)
  assert objectives.find(c).fixed(c) == ("reference",)
