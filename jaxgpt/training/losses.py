"""Cross entropy, label smoothing and z-loss, defined once for whole logits and for chunks of them.

With z = sum over v of exp(logits_v), log Z = log(z), and the mean over all V logits:

  nll     = log Z - logits_target     cross entropy, in nats
  uniform = log Z - mean(logits)      cross entropy with the uniform distribution
  loss    = (1 - e) nll + e uniform + z_loss (log Z)^2
  d nll / d logits = softmax(logits) - onehot(target)

e is the label smoothing of arXiv:1512.00567, section 7. z-loss keeps Z near 1 (PaLM,
arXiv:2204.02311, section 5).

`cross_entropy` computes them for logits that exist at once. `chunked_loss` computes them for a
chunk of tokens at a time, where each device may hold only some columns of the logits.

B batch, T position, V vocabulary. X stands for the dimensions of the tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MeshAxes = tuple[str, ...]


class SoftmaxTerms(NamedTuple):
  """The loss terms of some tokens.

  Attributes:
    nll_X: Negative log likelihood of each target, in nats.
    log_z_X: Log of the softmax's normalizer.
    probs_XV: The softmax.
  """

  nll_X: jax.Array
  log_z_X: jax.Array
  probs_XV: jax.Array


def softmax_terms(
  logits_XV: jax.Array, targets_X: jax.Array, vocab_axes: MeshAxes = ()
) -> SoftmaxTerms:
  """Computes the loss terms of logits.

  Args:
    logits_XV: Float32. Inside a `shard_map`, this device's columns.
    targets_X: Token ids, counted from the first of these columns.
    vocab_axes: Mesh axes that the columns are sharded over. Sums and maxima go over them.
  """
  top = logits_XV.max(-1, keepdims=True)
  top = jax.lax.pmax(top, vocab_axes) if vocab_axes else top
  exp_XV = jnp.exp(logits_XV - top)
  z = psum(exp_XV.sum(-1, keepdims=True), vocab_axes)
  log_z_X = (jnp.log(z) + top)[..., 0]
  of_target = jnp.where(_is_target(logits_XV, targets_X), logits_XV, 0)
  of_target_X = psum(of_target.sum(-1), vocab_axes)
  return SoftmaxTerms(log_z_X - of_target_X, log_z_X, exp_XV / z)


def logits_gradient(
  probs_XV: jax.Array, targets_X: jax.Array, d_log_z_X1: jax.Array, d_target_X1: jax.Array
) -> jax.Array:
  """The gradient with respect to the logits.

  Args:
    probs_XV: The softmax.
    targets_X: Token ids, as in `softmax_terms`.
    d_log_z_X1: Gradient with respect to log Z, through nll and z-loss.
    d_target_X1: Minus the gradient with respect to the logit of the target.
  """
  return probs_XV * d_log_z_X1 - jnp.where(_is_target(probs_XV, targets_X), d_target_X1, 0)


def weighted_sums(
  nll_X: jax.Array,
  log_z_X: jax.Array,
  weights_X: jax.Array,
  z_loss: float,
  smoothing: float = 0.0,
  mean_X: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The weighted sums (loss, nll) over tokens. The first includes label smoothing and z-loss.

  Args:
    nll_X, log_z_X: From `softmax_terms` or `cross_entropy`.
    weights_X: Loss weight of each token.
    z_loss: Weight of log(Z)^2.
    smoothing: Label smoothing, in [0, 1).
    mean_X: Mean of each token's logits, if `smoothing` is not 0.
  """
  nll = loss = (nll_X * weights_X).sum()
  if smoothing:
    assert mean_X is not None
    uniform = ((log_z_X - mean_X) * weights_X).sum()
    loss = (1 - smoothing) * nll + smoothing * uniform
  if z_loss:
    loss = loss + z_loss * (jnp.square(log_z_X) * weights_X).sum()
  return loss, nll


@jax.custom_vjp
def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Negative log likelihood of each target, and the log of the softmax's normalizer.

  The backward pass reuses the softmax of the forward pass.

  Args:
    logits_BTV: Float32 logits with any number of leading dimensions.
    targets_BT: Token ids.

  Returns:
    (nll_BT, log_z_BT), in nats.
  """
  return _cross_entropy_fwd(logits_BTV, targets_BT)[0]


def _cross_entropy_fwd(logits_BTV, targets_BT):
  nll_BT, log_z_BT, probs_BTV = softmax_terms(logits_BTV, targets_BT)
  return (nll_BT, log_z_BT), (probs_BTV, targets_BT)


def _cross_entropy_bwd(saved, grads):
  probs_BTV, targets_BT = saved
  d_nll, d_log_z = (g[..., None] for g in grads)
  return logits_gradient(probs_BTV, targets_BT, d_nll + d_log_z, d_nll), None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def kl(logits_XV: jax.Array, others_XV: jax.Array) -> jax.Array:
  """KL(p || q) = sum over v of p_v (log p_v - log q_v), in nats, of two softmaxes.

  Args:
    logits_XV: Float32 logits of p.
    others_XV: Float32 logits of q.
  """
  log_p_XV, log_q_XV = jax.nn.log_softmax(logits_XV), jax.nn.log_softmax(others_XV)
  return (jnp.exp(log_p_XV) * (log_p_XV - log_q_XV)).sum(-1)


def psum(x: jax.Array, axes: MeshAxes) -> jax.Array:
  """The sum over mesh axes inside a `shard_map`, or x itself where there are none."""
  return jax.lax.psum(x, axes) if axes else x


def _is_target(logits_XV: jax.Array, targets_X: jax.Array) -> jax.Array:
  # A comparison fuses and stays local where V is sharded; a gather does neither.
  return jnp.arange(logits_XV.shape[-1]) == targets_X[..., None]
