"""Distillation: by its equation, span by span, from a live teacher and from stored tokens."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.config.architecture import architecture
from jaxgpt.errors import UserError
from jaxgpt.model import fixed_models
from jaxgpt.run import teacher as teacher_lib
from jaxgpt.training import build, objectives
from jaxgpt.training.objectives import distillation
from tests.training.objectives import models

SPANS = [[(5, 0), (6, 2)], [(12, 3)], [(7, 0)], []]  # (length, first learned) of each row's spans
SHARE, TEMPERATURE = 0.7, 2.0


def options(**keys):
  c = config.base()
  c.objective.update(dict(name="distillation", teacher_share=SHARE, temperature=TEMPERATURE) | keys)
  return c


def by_definition(setup, params, divergence):
  """(loss sum, cross entropy, divergence) of spans that the models see alone, without padding."""
  model, _, teacher, theirs, batch = setup
  loss = nll = kl = 0.0
  for row, spans in enumerate(SPANS):
    at = 0
    for length, first in spans:
      here = slice(at + first, at + length)
      ours_TV = models.logits(model, params, batch, row, at, at + length)[first:]
      theirs_TV = models.logits(teacher, theirs, batch, row, at, at + length)[first:]
      q, p = (jax.nn.softmax(x / TEMPERATURE) for x in (ours_TV, theirs_TV))
      p, q = (p, q) if divergence == "forward" else (q, p)
      more = (p * jnp.log(p / q)).sum()
      targets_T = batch["targets"][row, here]
      hard = -jnp.log(jax.nn.softmax(ours_TV)[np.arange(len(targets_T)), targets_T]).sum()
      loss += (1 - SHARE) * hard + SHARE * TEMPERATURE**2 * more
      nll, kl, at = nll + hard, kl + more, at + length
  return loss, (nll, kl)


@pytest.fixture(scope="module")
def bigrams():
  """(student, its weights, teacher, its weights, batch)."""
  return (
    models.Bigram(),
    models.bigram(0),
    models.Bigram(),
    models.bigram(1),
    models.rows(0, SPANS),
  )


def check_equation(setup, divergence, jit):
  model, params, teacher, theirs, batch = setup
  c = options(divergence=divergence)
  loss_fn = objectives.OBJECTIVES["distillation"].loss_fn(model, c.objective, teacher)

  def summed(params):
    loss, weight, aux = loss_fn(params, {fixed_models.TEACHER: theirs}, batch, None)
    return loss, (weight, aux)

  (got, (weight, aux)), grads = jit(jax.value_and_grad(summed, has_aux=True))(params)
  (want, (nll, kl)), want_grads = jit(
    jax.value_and_grad(lambda p: by_definition(setup, p, divergence), has_aux=True)
  )(params)
  assert weight == batch["loss_weights"].sum() == 5 + 4 + 9 + 7
  found = [float(x) for x in (got, aux["nll"], aux["kl"])]
  assert found == [pytest.approx(float(x), rel=1e-5) for x in (want, nll, kl)]
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, grads, want_grads)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_loss_and_gradient_are_those_of_the_equation(bigrams, divergence):
  check_equation(bigrams, divergence, lambda f: f)


@pytest.mark.slow
def test_packing_and_padding_change_no_tokens_loss():
  """Transformers of another width and depth give each span the loss that it has alone."""
  c, _, teacher, state = models.make(model__num_layers=2, model__width=24, model__num_heads=3)
  theirs = models.moved(state["params"], 2)
  _, _, parts, state = models.make(
    objective__name="distillation",
    objective__teacher="RUN",
    objective__teacher_config=json.dumps(architecture(c.model)),
  )
  shapes = jax.tree.map(jnp.shape, theirs)
  assert jax.tree.map(jnp.shape, state["frozen"]["teacher"]) == shapes
  params = models.moved(state["params"])
  setup = parts.model, params, teacher.model, theirs, models.rows(0, SPANS)
  check_equation(setup, "forward", jax.jit)


def test_a_student_that_is_its_teacher_has_no_divergence(bigrams):
  model, params, _, _, batch = bigrams
  loss_fn = objectives.OBJECTIVES["distillation"].loss_fn(model, options().objective, model)
  _, weight, aux = loss_fn(params, {fixed_models.TEACHER: params}, batch, None)
  assert abs(aux["kl"]) < 1e-5 * weight


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_stored_tokens_see_at_most_the_divergence_and_with_all_tokens_all_of_it(
  bigrams, divergence
):
  model, params, teacher, theirs, batch = bigrams
  apply = lambda model, params: distillation.apply(model, params, None, batch, None).logits
  ours, whole = apply(model, params), apply(teacher, theirs)
  want_BT = distillation.divergence(ours, whole, options(divergence=divergence).objective)
  for best in (3, models.VOCAB - 1):
    c = options(divergence=divergence, top_k=best)
    c.data.seq_len = models.LENGTH
    arrays = distillation._top_k(teacher, c.objective)(theirs, batch)
    found = {k: (v.shape[1:], v.dtype) for k, v in arrays.items()}
    assert found == distillation._stored_shapes(c)
    got_BT = distillation.stored_divergence(ours, batch | arrays, c.objective)
    assert (got_BT <= want_BT + 1e-5).all() and (got_BT >= -1e-6).all()
  np.testing.assert_allclose(got_BT, want_BT, rtol=1e-4, atol=1e-5)
  assert want_BT.max() > 0.01


@pytest.mark.parametrize(
  "keys, message",
  [
    (dict(model__vocab_size=99), "has 264 tokens in its vocabulary, .*; set model.vocab_size=264"),
    (dict(data__seq_len=64, model__max_len=64), "a context of 32 tokens, but data.seq_len=64"),
    (
      dict(data__stages=((2, 8, 64),), model__max_len=64),
      "a context of 32 tokens, but data.stages has rows of 64",
    ),
    (dict(objective__teacher="none"), "objective.teacher='none' holds no config.json"),
  ],
)
def test_a_teacher_that_does_not_fit_is_refused(tiny, teacher_run, keys, message):
  keys = dict(objective__teacher=str(teacher_run), model__vocab_size=264) | keys
  c = config.resolve(tiny(objective__name="distillation", **keys))
  with pytest.raises(UserError, match=message):
    teacher_lib.settle(c)


def test_distillation_needs_a_teacher(tiny):
  with pytest.raises(UserError, match="needs objective.teacher"):
    build.check(tiny(objective__name="distillation"))
