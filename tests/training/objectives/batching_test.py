"""No example's loss depends on how the examples are batched, and losses follow their equations.

The reference runs the model on each example alone, in a row of its own length without padding, and
computes the loss from the logits by its definition. `labelled_test` has the objectives of other
kinds of data.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import config
from jaxgpt.model import fixed_models, transformer
from jaxgpt.training import objectives
from jaxgpt.training.objectives import forward, preference
from tests import quick
from tests.training.objectives import models

ROWS, LENGTH, V, BEST = 4, 24, 13, 3
SMOOTHING, SHARE, TEMPERATURE, BETA, GAMMA = 0.1, 0.7, 2.0, 0.7, 0.3
# All examples are equally long, so that the reference is one program for all of them.
TOKENS, FIRST = 7, (2, 0, 4)  # their length, and the first learned token of each
LABELS = (2, 0, 1)
SIDES = preference.SIDES
OPTIONS: dict[str, dict[str, Any]] = {
  "causal_lm": dict(name="causal_lm", label_smoothing=SMOOTHING),
  "masked_lm": dict(name="masked_lm", label_smoothing=SMOOTHING),
  "classification": dict(name="classification", label_smoothing=SMOOTHING),
  "live": dict(name="distillation", teacher_share=SHARE, temperature=TEMPERATURE),
  "stored": dict(
    name="distillation",
    teacher_share=SHARE,
    temperature=TEMPERATURE,
    divergence="reverse",
    top_k=BEST,
  ),
} | {name: dict(name="preference", loss=name, beta=BETA, gamma=GAMMA) for name in preference.LOSSES}
FIRST_KINDS = ("causal_lm", "stored")
KINDS = quick.first(sorted(OPTIONS, key=lambda kind: kind not in FIRST_KINDS), len(FIRST_KINDS))


class Case(NamedTuple):
  """An objective with its model and examples.

  Attributes:
    examples: For each example the arrays of each of its rows: one, or two of a pair.
    params: The weights.
    alone: By definition, for each example (its loss, its weight).
    grads: By definition, the gradient of the sum of the losses.
    loss: Jitted (params, batch) -> ((loss sum, (weight, aux)), gradient).
  """

  examples: list[list[dict[str, np.ndarray]]]
  params: Any
  alone: list[tuple[float, float]]
  grads: Any
  loss: Callable[..., Any]


def make_config(kind):
  c = config.base()
  c.objective.update(OPTIONS[kind])
  c.model.update(dict(vocab_size=V, num_layers=1, width=8, num_heads=2, mlp_width=16))
  c.model.update(dict(position="rotary", init_std=0.5))
  c.model.causal = kind not in ("masked_lm", "classification")
  if kind == "classification":
    c.model.update(dict(head="classifier", pooling="mean", num_labels=3))
  c.data.seq_len, c.data.batch_size = LENGTH, ROWS
  return config.resolve(c)


def nll(logits_TV, targets_T, xp):
  """(cross entropy, with smoothing) of each position."""
  log_p_TV = logits_TV - xp.log(xp.exp(logits_TV).sum(-1, keepdims=True))
  hard_T = -log_p_TV[np.arange(len(targets_T)), targets_T]
  return hard_T, (1 - SMOOTHING) * hard_T - SMOOTHING * log_p_TV.mean(-1)


def divergence(kind, x_TV, y_TV, ids_TK, xp):
  """KL of teacher y and student x: over the vocabulary, or over K tokens and all others."""
  p_TV, q_TV = (xp.exp(z / TEMPERATURE) for z in (y_TV, x_TV))
  p, q = (z / z.sum(-1, keepdims=True) for z in (p_TV, q_TV))
  if kind == "live":
    return (p * xp.log(p / q)).sum(-1)
  rows = np.arange(len(ids_TK))[:, None]
  p, q = (z[rows, ids_TK] for z in (p, q))
  p, q = (xp.concatenate([z, 1 - z.sum(-1, keepdims=True)], -1) for z in (p, q))
  return (q * xp.log(q / p)).sum(-1)


def pair_loss(name, c, rc, nc, r, rr, nr, xp):
  """The loss of a pair from log-likelihoods, those of the reference, and lengths."""
  minus_log_sigmoid = lambda x: xp.log(1 + xp.exp(-x))
  log_odds = lambda x: x - xp.log(1 - xp.exp(x))
  if name == "dpo":
    return minus_log_sigmoid(BETA * ((c - rc) - (r - rr)))
  if name == "dpo_norm":
    return minus_log_sigmoid(BETA * ((c - rc) / nc - (r - rr) / nr))
  if name == "ipo":
    return ((c - rc) / nc - (r - rr) / nr - 1 / (2 * BETA)) ** 2
  if name == "orpo":
    return -c / nc + BETA * minus_log_sigmoid(log_odds(c / nc) - log_odds(r / nr))
  return minus_log_sigmoid(BETA * (c / nc - r / nr) - GAMMA)


def loss_alone(kind, number, rows, ours, theirs, ids_TK, xp):
  """(loss, weight) of an example by definition, from the logits of its rows alone."""
  if kind == "classification":
    _, smooth = nll(ours[0][None], np.array([LABELS[number]]), xp)
    return smooth[0], 1
  learned = [row["loss_weights"] > 0 for row in rows]
  targets = [row["targets"] for row in rows]
  if kind in preference.LOSSES:
    side = []
    for x, y, t, w in zip(ours, theirs, targets, learned):
      side += [-(nll(z, t, xp)[0] * w).sum() for z in (x, y)] + [w.sum()]
    return pair_loss(kind, *side, xp), 1
  hard_T, smooth_T = nll(ours[0], targets[0], xp)
  if kind in ("live", "stored"):
    kl_T = divergence(kind, ours[0], theirs[0], ids_TK, xp)
    smooth_T = (1 - SHARE) * hard_T + SHARE * TEMPERATURE**2 * kl_T
  return (smooth_T * learned[0]).sum(), learned[0].sum()


@functools.cache
def case(kind):
  c = make_config(kind)
  model = transformer.Transformer(ml_collections.FrozenConfigDict(c.model))
  params, other = (transformer.init(model, jax.random.key(i)) for i in range(2))
  other = models.moved(other, 2, 0.3)

  sides = 2 if kind in preference.LOSSES else 1
  draw = np.random.default_rng(0)
  tokens, targets = draw.integers(1, V, (2, 3, sides, TOKENS)).astype(np.int32)
  found = [
    [
      {
        "tokens": tokens[i, side],
        "targets": targets[i, side],
        "loss_weights": np.float32(np.arange(TOKENS) >= FIRST[(i + side) % 3]),
      }
      for side in range(sides)
    ]
    for i in range(3)
  ]

  def run(params, tokens_T):
    """The output for one text, which is a row of its own."""
    out = model.apply({"params": params}, tokens_T[None], jnp.arange(TOKENS)[None])
    return out.logits[0]

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def reference(params, theirs, ids):
    logits = jax.lax.map(lambda x: run(params, x), tokens.reshape(-1, TOKENS))
    logits = logits.reshape(3, sides, *logits.shape[1:])
    losses = [loss_alone(kind, i, found[i], logits[i], theirs[i], ids[i], jnp) for i in range(3)]
    return sum(loss for loss, _ in losses), logits

  ids = np.zeros((3, TOKENS, BEST), np.int32)
  (_, ours), _ = reference(params, jnp.ones((3, sides, TOKENS, V)), ids)
  theirs = ours if kind == "classification" else reference(other, ours, ids)[0][1]
  if kind == "stored":
    p = np.exp(np.float64(theirs[:, 0]) / TEMPERATURE)
    p /= p.sum(-1, keepdims=True)
    ids = np.argsort(-p, axis=-1)[..., :BEST].astype(np.int32)
    p = np.take_along_axis(p, ids, -1)
    p = np.concatenate([p, 1 - p.sum(-1, keepdims=True)], -1)
    for i, (row,) in enumerate(found):
      row |= {"teacher_ids": ids[i], "teacher_log_p": np.float32(np.log(p[i]))}
  grads = reference(params, theirs, ids)[1]
  alone = [
    loss_alone(kind, i, found[i], np.float64(ours[i]), np.float64(theirs[i]), ids[i], np)
    for i in range(3)
  ]
  frozen = None
  if kind == "live":
    frozen = {fixed_models.TEACHER: other}
  elif objectives.find(c).fixed(c) == (fixed_models.REFERENCE,):
    frozen = {fixed_models.REFERENCE: other}
  loss_fn = forward.make(model, c, *([model] if kind == "live" else []))

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(params, batch):
    total, weight, aux = loss_fn(params, frozen, batch, None)
    return total, (weight, aux)

  return Case(found, params, alone, grads, loss)


def placed(rows, side):
  """The arrays of a batch whose rows hold examples one after the other; () is padding."""
  of = lambda example: example[side]
  first = next(of(example) for row in rows for example in row)
  out = {name: np.zeros((ROWS, LENGTH, *x.shape[1:]), x.dtype) for name, x in first.items()}
  out |= {name: np.zeros((ROWS, LENGTH), np.int32) for name in ("segment_ids", "positions")}
  for i, row in enumerate(rows):
    at = 0
    for segment, example in enumerate(map(of, row), 1):
      end = at + len(example["tokens"])
      for name, x in example.items():
        out[name][i, at:end] = x
      out["segment_ids"][i, at:end], out["positions"][i, at:end] = segment, range(end - at)
      at = end
  return out


def batch_of(kind, rows):
  """A batch whose rows hold the examples of these numbers, () for a row of padding."""
  rows = [*rows, *[()] * (ROWS - len(rows))]
  examples = [[case(kind).examples[i] for i in row] for row in rows]
  if kind in preference.LOSSES:
    return {name: placed(examples, side) for side, name in enumerate(SIDES)}
  batch = placed(examples, 0)
  if kind == "classification":
    batch["labels"] = np.array([LABELS[row[0]] if row else 0 for row in rows], np.int32)
    batch["loss_weights"] = np.array([float(bool(row)) for row in rows], np.float32)
  return batch


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradients_are_those_of_the_equation(kind):
  example = case(kind)
  (total, (weight, _)), grads = example.loss(example.params, batch_of(kind, [(0,), (1,), (2,)]))
  np.testing.assert_allclose(total, sum(loss for loss, _ in example.alone), rtol=1e-5)
  assert weight == sum(weight for _, weight in example.alone)
  largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(example.grads))
  assert largest > 1e-2
  for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(example.grads), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5 * largest)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_padding_packing_and_company_change_no_examples_loss(kind, data):
  order = data.draw(st.permutations(range(3)), "order")[: data.draw(st.integers(1, 3), "count")]
  rows = [(i,) for i in order]
  if kind not in ("classification", *preference.LOSSES):
    cut = data.draw(st.integers(1, len(order)), "documents of the first row")
    rows = [tuple(order[:cut]), *rows[cut:]]
  for place in data.draw(st.lists(st.integers(0, 3), max_size=ROWS - len(rows)), "padding"):
    rows.insert(place, ())
  example = case(kind)
  (total, (weight, _)), grads = example.loss(example.params, batch_of(kind, rows))
  want = [example.alone[i] for i in order]
  np.testing.assert_allclose(total, sum(loss for loss, _ in want), rtol=1e-5, atol=1e-5)
  assert weight == sum(weight for _, weight in want)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
