"""Scores of single predictions: log likelihood, and whether the likeliest choice is the right one.

`evaluation` sums a loss over batches on the devices. Tables by position or by length, strided
windows, comparisons of two runs and benchmarks need each prediction by itself, on the host.

B row of a batch, T position, C position of a chunk, V vocabulary or class, K class of several.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.model import ops
from jaxgpt.model.attention import token_order
from jaxgpt.model.transformer import Transformer
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.training import losses, objectives, xla_options
from jaxgpt.tree import PyTree

# Layouts whose predictions are choices, and the head of the model that makes them.
_HEADS = {
  "causal_lm": "lm",
  "masked_lm": "lm",
  "classification": "classifier",
  "multi_label": "classifier",
  "token_classification": "token_classifier",
}


class Scores(NamedTuple):
  """The predictions of a batch, [B, T], or [B] where a row has one label or several.

  Attributes:
    weight: 1 where there is a prediction to score, else 0.
    nll: Negative log likelihood of the target, in nats. With several labels, the mean over classes.
    correct: Whether the target is the likeliest choice. With several labels, whether all classes
      are right.
    confidence: Probability of the likeliest choice. With several labels [B, K], since each class is
      a choice between yes and no.
    labels: With several labels, whether a row has each class, and whether it is predicted: [B, K]
      each.
  """

  weight: Any
  nll: Any
  correct: Any
  confidence: Any
  labels: tuple[Any, Any] | None = None


Step: TypeAlias = Callable[[PyTree, PyTree], Scores]


def has_scores(c: ml_collections.ConfigDict) -> bool:
  """Whether the predictions of a config's objective are choices that can be scored one by one."""
  layout = objectives.find(c).layout
  if layout == "classification" and c.model.num_labels == 1:  # a regression
    return False
  return c.model.head == _HEADS.get(layout)


def make_step(model: Transformer, mesh: jax.sharding.Mesh, chunk: int = 0) -> Step:
  """Makes the jitted function (params, batch) -> `Scores`, of all rows in each process.

  Args:
    model: A model with logits over a vocabulary or over classes.
    mesh: The device mesh.
    chunk: Tokens per device whose logits exist at once, in whole columns of the batch. 0: all.
  """
  shards = mesh_lib.num_batch_shards(mesh.shape)

  def step(params: PyTree, batch: PyTree) -> Scores:
    causal, of_rows = model.cfg.causal, "labels" in batch
    batch = objectives.balanced(batch) if causal else batch
    targets = batch["labels"] if of_rows else batch["targets"]
    rows = -(-targets.shape[0] // shards)  # of a device
    positions = max(1, chunk // rows)
    if chunk and not of_rows and positions < targets.shape[1]:

      def project(x: jax.Array, w: jax.Array, bias: jax.Array | None) -> Any:
        return _by_chunk(model.cfg, x, w, bias, targets, positions)

      nll, correct, confidence = objectives.apply(model, params, None, batch, None, project).logits
    else:
      logits = objectives.apply(model, params, None, batch, None).logits
      if of_rows and targets.ndim > 1:
        return _of_sets(logits, targets, batch["loss_weights"])
      nll, correct, confidence = _scores(logits, targets)
    back = lambda x: token_order.restore(x) if causal and x.ndim > 1 else x
    return Scores(*map(back, (batch["loss_weights"], nll, correct, confidence)))

  options = xla_options.of_mesh(mesh)
  return jax.jit(step, out_shardings=NamedSharding(mesh, P()), compiler_options=options)


def _scores(logits_XV: jax.Array, targets_X: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  nll_X, log_z_X = losses.cross_entropy(logits_XV, targets_X)
  top_X = logits_XV.max(-1)
  return nll_X, logits_XV.argmax(-1) == targets_X, jnp.exp(top_X - log_z_X)


def _of_sets(x_BK: jax.Array, labels_BK: jax.Array, weights_B: jax.Array) -> Scores:
  """Scores of rows with any number of classes, see `objectives.multi_label`."""
  nll_B = (jax.nn.softplus(x_BK) - labels_BK * x_BK).mean(-1)
  has_BK, predicted_BK = labels_BK > 0, x_BK > 0
  correct_B = (has_BK == predicted_BK).all(-1)
  confidence_BK = jax.nn.sigmoid(jnp.abs(x_BK))
  return Scores(weights_B, nll_B, correct_B, confidence_BK, (has_BK, predicted_BK))


def _by_chunk(
  cfg: ml_collections.FrozenConfigDict,
  x_BTD: jax.Array,
  w_DV: jax.Array,
  bias_V: jax.Array | None,
  targets_BT: jax.Array,
  chunk: int,
) -> tuple[jax.Array, ...]:
  """`_scores` of hidden states, for `chunk` positions at a time."""
  T = targets_BT.shape[1]

  def cut(x: jax.Array) -> jax.Array:
    """[B, T, …] -> [chunks, B, C, …], padded."""
    x = jnp.pad(x, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

  def one(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    x_BCD, targets_BC = inputs
    w = w_DV.astype(x_BCD.dtype)
    logits_BCV = jnp.einsum("BCD,DV->BCV", x_BCD, w, preferred_element_type=jnp.float32)
    logits_BCV = logits_BCV if bias_V is None else logits_BCV + bias_V
    return _scores(ops.softcap(logits_BCV, cfg.logit_softcap), targets_BC)

  out = jax.lax.map(one, (cut(x_BTD), cut(targets_BT)))
  return tuple(jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :T] for x in out)


def run(step: Step, params: PyTree, batches: Iterable[PyTree]) -> Iterator[Scores]:
  """Scores batches on the devices: NumPy arrays, in order.

  The scores of a batch are read after the next batch is dispatched, so the device is never idle.
  """
  waiting: Scores | None = None
  for batch in itertools.chain(batches, (None,)):
    scores = None if batch is None else step(params, batch)
    if waiting is not None:
      yield jax.tree.map(np.asarray, jax.device_get(waiting))
    waiting = scores
