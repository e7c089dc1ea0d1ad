"""A sparse autoencoder: a dictionary of directions, few of which make up each activation.

A layer represents more properties than it has dimensions, as directions that overlap. A sparse
autoencoder looks for them: it writes each activation as a sum of few directions out of many. The
k largest coefficients are kept (arXiv:2406.04093, equations 2 and 3, and appendix A):

  z = ReLU(TopK((x - bias) W_encoder))     x' = z W_decoder + bias

  loss = |x - x'|^2 + 1/32 |(x - x') - z_dead W_decoder|^2

z_dead has the largest coefficients of features that have not been active for a while. So they learn
the rest that the others leave, and come back. Rows of the decoder have unit length, so coefficients
are in the units of the activations.

M activations, D dimensions, F features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.training import optimizers, schedules
from jaxgpt.tree import PyTree

_AXES = {"encoder": ("embed", "mlp"), "decoder": ("mlp", "embed"), "bias": ("embed",)}
_DEAD_AFTER = 50  # steps without an activation
_DEAD_WEIGHT = 1 / 32


class Autoencoder(NamedTuple):
  """The weights, in the units of the activations.

  Attributes:
    encoder: [D, F].
    decoder: [F, D], rows of unit length.
    bias: [D], what an activation without features is.
    k: Features that are kept of each activation.
  """

  encoder: jax.Array
  decoder: jax.Array
  bias: jax.Array
  k: int


class Training(NamedTuple):
  """Settings of `fit`.

  Attributes:
    features: F.
    k: Features that are kept of each activation, 1 to F.
    steps: Training steps.
    batch: Activations of a step.
    lr: Peak learning rate, which falls to 0.
    seed: Seed of the first weights and of the order of the activations.
  """

  features: int
  k: int
  steps: int
  batch: int = 1024
  lr: float = 2e-3
  seed: int = 0


def encode(autoencoder: Autoencoder, x: jax.Array) -> jax.Array:
  """The coefficients of activations [..., D]: [..., F], 0 unless among the k largest."""
  return _largest((x - autoencoder.bias) @ autoencoder.encoder, autoencoder.k)


def decode(autoencoder: Autoencoder, z: jax.Array) -> jax.Array:
  """The activations [..., D] that coefficients [..., F] stand for."""
  return z @ autoencoder.decoder + autoencoder.bias


def _largest(x: jax.Array, k: int) -> jax.Array:
  """ReLU(TopK(x)) over the last axis. Equal coefficients at the limit are all kept."""
  least = jax.lax.top_k(x, k)[0][..., -1:]
  return jnp.where(x >= least, jnp.maximum(x, 0.0), 0.0)


def fit(
  x_MD: np.ndarray, how: Training, tell: Callable[[int, float], None] = lambda step, loss: None
) -> Autoencoder:
  """Trains an autoencoder with AdamW of jaxgpt.

  Args:
    x_MD: Activations. They are read in a new random order in each pass.
    how: The settings.
    tell: Called with each step and the share of the variance that is not explained.

  Raises:
    UserError: k is larger than the number of features, or activations do not vary.
  """
  if not 1 <= how.k <= how.features:
    raise UserError(f"--k={how.k}: choose 1 to {how.features}, the number of features")
  mean_D = x_MD.mean(0)
  scale = float(np.sqrt(np.square(x_MD - mean_D).mean()))
  if not scale:
    raise UserError("the activations are all the same; choose another --layer or --tap")
  c = config.base()
  c.optim.update(dict(lr=how.lr, weight_decay=0.0))
  c.schedule.update(dict(name="linear", warmup_steps=0, final_ratio=0.0))
  c.train.steps = how.steps
  tx = optimizers.make(config.resolve(c), schedules.make(c), _AXES, dict.fromkeys(_AXES, 0))
  rng = np.random.default_rng(how.seed)
  weights = _start(jax.random.key(how.seed), x_MD.shape[1], how.features)
  state, idle_F = tx.init(weights), jnp.zeros(how.features, jnp.int32)
  step = _make_step(tx, how.k)
  batch = min(how.batch, len(x_MD))
  order = np.zeros(0, np.int64)
  for i in range(how.steps):
    if len(order) < batch:
      order = rng.permutation(len(x_MD))
    chosen, order = order[:batch], order[batch:]
    x = (x_MD[chosen] - mean_D) / scale  # mean square 1, so that one learning rate fits all
    weights, state, idle_F, loss = step(weights, state, idle_F, x)
    tell(i + 1, float(loss))
  bias_D = mean_D + scale * np.asarray(weights["bias"])
  return Autoencoder(weights["encoder"], weights["decoder"], jnp.asarray(bias_D), how.k)


def _start(key: jax.Array, dims: int, features: int) -> PyTree:
  """Random directions, with the encoder as the transposed decoder."""
  decoder_FD = _unit(jax.random.normal(key, (features, dims)))
  return {"encoder": decoder_FD.T, "decoder": decoder_FD, "bias": jnp.zeros(dims)}


def _unit(x_FD: jax.Array) -> jax.Array:
  return x_FD / jnp.maximum(jnp.linalg.norm(x_FD, axis=-1, keepdims=True), 1e-12)


def _left_by_dead(
  rest_MD: jax.Array, raw_MF: jax.Array, dead_F: jax.Array, decoder_FD: jax.Array
) -> jax.Array:
  """Mean squared error with which dead features reconstruct the error of the others.

  At most D / 2 of them are active at a token.
  """
  most = min(max(rest_MD.shape[1] // 2, 1), raw_MF.shape[1])
  z_MF = _largest(jnp.where(dead_F, raw_MF, -jnp.inf), most)
  return jnp.square(rest_MD - z_MF @ decoder_FD).mean()


def _make_step(tx: optax.GradientTransformation, k: int) -> Callable[..., Any]:
  """The compiled step (weights, state, idle steps of each feature, x) -> (the same, loss)."""

  def loss_of(weights: PyTree, idle_F: jax.Array, x_MD: jax.Array) -> tuple[jax.Array, Any]:
    raw_MF = (x_MD - weights["bias"]) @ weights["encoder"]
    z_MF = _largest(raw_MF, k)
    rest_MD = x_MD - z_MF @ weights["decoder"] - weights["bias"]
    loss = jnp.square(rest_MD).mean()
    dead_F = idle_F >= _DEAD_AFTER
    args = jax.lax.stop_gradient(rest_MD), raw_MF, dead_F, weights["decoder"]
    left = jax.lax.cond(dead_F.any(), _left_by_dead, lambda *_: 0.0, *args)
    return loss + _DEAD_WEIGHT * left, (loss, (z_MF > 0).any(0))

  @jax.jit
  def step(weights: PyTree, state: PyTree, idle_F: jax.Array, x_MD: jax.Array) -> Any:
    grads, (loss, active_F) = jax.grad(loss_of, has_aux=True)(weights, idle_F, x_MD)
    grads, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    updates, state = tx.update(grads, state, weights)
    weights = optax.apply_updates(weights, updates)
    weights = weights | {"decoder": _unit(weights["decoder"])}
    return weights, state, jnp.where(active_F, 0, idle_F + 1), loss

  return step
