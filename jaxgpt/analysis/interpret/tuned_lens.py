"""The tuned lens (arXiv:2303.08112): predictions from each layer, through a trained translator.

The logit lens reads a residual stream as if no layer came after it. Layers may still turn and shift
it, so its predictions are often wrong where the stream has the answer. The tuned lens learns an
affine map for each place, and leaves the model as it is:

  logits of stream r = unembed(h + h A_r + b_r)
  loss               = mean over tokens and streams of KL(model's prediction || that of the lens)

A and b start at zero, which is the logit lens.

B batch, T position, D model, V vocabulary, L layers, R residual streams.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt import config
from jaxgpt.analysis.interpret import lens, taps
from jaxgpt.errors import UserError
from jaxgpt.model import transformer
from jaxgpt.training import optimizers, schedules
from jaxgpt.tree import PyTree

_AXES = {"a": ("layers", "embed", "embed"), "b": ("layers", "embed")}


class Translators(NamedTuple):
  """The maps of the streams before each layer: A is [L, D, D], b is [L, D]."""

  a: jax.Array
  b: jax.Array


class Scores(NamedTuple):
  """Mean KL divergence of a lens from the model's prediction, in nats per token, [L] each.

  Attributes:
    logit: Of the logit lens.
    tuned: Of the tuned lens.
  """

  logit: np.ndarray
  tuned: np.ndarray


def none(cfg: Any) -> Translators:
  """Translators that change nothing. `cfg` is the config's `model` section."""
  zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
  return Translators(
    zeros((cfg.num_layers, cfg.width, cfg.width)), zeros((cfg.num_layers, cfg.width))
  )


def check(cfg: Any) -> None:
  """Raises a UserError if a model does not predict tokens. `cfg` is the `model` section."""
  if cfg.head != "lm":
    raise UserError(f"model.head={cfg.head!r}: the tuned lens is for models that predict tokens")


def fit(
  model: transformer.Transformer,
  params: PyTree,
  batches: Sequence[PyTree],
  steps: int,
  lr: float = 1e-2,
  tell: Callable[[int, float], None] = lambda step, loss: None,
) -> Translators:
  """Trains the translators with AdamW and a linear decay. The model does not change.

  Args:
    model: From `taps.readable`.
    params: All its parameters.
    batches: Text, see `calibration.rows`. They are read in order, again and again.
    steps: Number of steps, one batch each.
    lr: Peak learning rate.
    tell: Called with each step and its loss.

  Raises:
    UserError: The model does not predict tokens.
  """
  check(model.cfg)
  c = config.base()
  c.optim.update(dict(lr=lr, weight_decay=0.0))
  c.schedule.update(dict(name="linear", warmup_steps=0, final_ratio=0.0))
  c.train.steps = steps
  depths = {"a": 0, "b": 0}
  tx = optimizers.make(config.resolve(c), schedules.make(c), _AXES, depths)
  start = none(model.cfg)._asdict()

  @jax.jit
  def step(weights: PyTree, state: PyTree, params: PyTree, batch: PyTree) -> Any:
    def loss(weights: PyTree) -> jax.Array:
      sums_L, tokens = divergences(model, params, Translators(**weights), batch)
      return (sums_L / jnp.maximum(tokens, 1.0)).mean()

    value, grads = jax.value_and_grad(loss)(weights)
    grads, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    updates, state = tx.update(grads, state, weights)
    return optax.apply_updates(weights, updates), state, value

  weights, state = start, tx.init(start)
  for i in range(steps):
    weights, state, value = step(weights, state, params, batches[i % len(batches)])
    tell(i + 1, float(value))
  return Translators(**weights)


def translated(streams_RBTD: jax.Array, translators: Translators) -> jax.Array:
  """Streams as the lens reads them: translated before each layer, the last one as it is.

  Args:
    streams_RBTD: From `lens.streams`, R = L + 1.
    translators: The maps.
  """
  h_LBTD = streams_RBTD[:-1]
  moved = h_LBTD + jnp.einsum("lbtd,lde->lbte", h_LBTD, translators.a)
  moved += translators.b[:, None, None]
  return jnp.concatenate([moved, streams_RBTD[-1:]])


def divergences(
  model: transformer.Transformer, params: PyTree, translators: Translators, batch: PyTree
) -> tuple[jax.Array, jax.Array]:
  """KL(model || lens), summed over the tokens of a batch without padding, in nats.

  Args:
    model: From `taps.readable`.
    params: All its parameters.
    translators: The maps.
    batch: With `tokens`, `segment_ids` and `positions`, [B, T] each.

  Returns:
    (sums [L], number of tokens).
  """
  inputs = taps.Inputs(batch["tokens"], batch["segment_ids"], batch["positions"])
  reading = taps.forward(model, params, inputs, ("resid_pre",), {})
  real_BT = (batch["segment_ids"] > 0).astype(jnp.float32)
  # The model's own prediction is what is to be learned, and has no gradient.
  log_p = jax.lax.stop_gradient(jax.nn.log_softmax(reading.output.logits))

  def one(stream: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    h_BTD, a_DD, b_D = stream
    logits = lens.unembed(model, params, inputs, h_BTD + h_BTD @ a_DD + b_D)
    kl_BT = (jnp.exp(log_p) * (log_p - jax.nn.log_softmax(logits))).sum(-1)
    return (kl_BT * real_BT).sum()

  streams = (jax.lax.stop_gradient(reading.at["resid_pre"]), *translators)
  # The logits of one stream at a time.
  return jax.lax.map(jax.checkpoint(one), streams), real_BT.sum()


def compare(
  model: transformer.Transformer,
  params: PyTree,
  translators: Translators,
  batches: Sequence[PyTree],
) -> Scores:
  """Measures the logit lens and the tuned lens on text that the latter was not trained on.

  Args:
    model: From `taps.readable`.
    params: All its parameters.
    translators: From `fit`.
    batches: Text.
  """
  measure = jax.jit(functools.partial(divergences, model))

  def mean(which: Translators) -> np.ndarray:
    sums_L, tokens = np.zeros(model.cfg.num_layers), 0.0
    for batch in batches:
      of_batch_L, count = measure(params, which, batch)
      sums_L, tokens = sums_L + np.asarray(of_batch_L), tokens + float(count)
    return sums_L / max(tokens, 1.0)

  return Scores(mean(none(model.cfg)), mean(translators))
