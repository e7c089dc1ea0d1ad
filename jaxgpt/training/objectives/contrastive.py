"""Embeddings of texts, learned from pairs of a query and a text that answers it.

B rows, D width.
"""

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt.errors import UserError
from jaxgpt.model import ops
from jaxgpt.model.transformer import Transformer
from jaxgpt.training import losses
from jaxgpt.training.objectives.forward import apply, router_terms
from jaxgpt.training.objectives.microbatches import mapped
from jaxgpt.training.objectives.objective import OBJECTIVES, Aux, Batch, LossFn, Objective
from jaxgpt.tree import PyTree

_LEAST_NORM = 1e-12  # of a vector that cosines are taken of


def embeddings(model: Transformer, out: jax.Array, batch: Batch) -> jax.Array:
  """The embeddings of texts: float32 [B, D], of length 1.

  Args:
    model: A model with the head 'pooler', or with none.
    out: Its `logits`: pooled vectors [B, D], or hidden states [B, T, D], which `model.pooling`
      turns into one vector.
    batch: With `positions` and `segment_ids` [B, T].
  """
  if model.cfg.head == "none":
    out = ops.pooled(out, model.cfg.pooling, batch["positions"], batch["segment_ids"])
  x_BD = out.astype(jnp.float32)
  square_B1 = jnp.square(x_BD).sum(-1, keepdims=True)
  return x_BD * jax.lax.rsqrt(jnp.maximum(square_B1, _LEAST_NORM**2))


def _contrastive(
  model: Transformer, c_objective: ml_collections.ConfigDict, microbatches: int = 1
) -> LossFn:
  """Cross entropy of each query's positive among the positives of the global batch (InfoNCE).

  With s_ij = cos(query i, positive j) / similarity_temperature,

    loss of row i = log sum over j of exp(s_ij) - s_ii

  (arXiv:1807.03748, eq. 4; with in-batch negatives arXiv:1705.00652, section 4.4, and
  `MultipleNegativesRankingLoss` of sentence-transformers, whose scale is 1 / temperature). With
  `symmetric` it is the mean of this and of the same with queries and positives exchanged. j goes
  over the rows of all devices, processes and microbatches. Rows of padding are nobody's negatives.

  Returns:
    A loss function. Its aux has 'nll' (the loss), 'correct' (queries whose positive is the nearest
    of the batch) and sums of the router.
  """

  def loss_fn(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Aux]:
    weights_B = batch["query"]["loss_weights"]
    keys = (None, None) if key is None else jax.random.split(key)
    sides: list[jax.Array] = []
    extra: jax.Array | float = 0.0
    aux: Aux = {}

    def embedded(
      rows: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array | float, Aux]]:
      out = apply(model, params, frozen, rows, key)
      terms = router_terms(model, out.router, rows["loss_weights"].sum() / 2)
      return embeddings(model, out.logits, rows), terms

    number = 1 if key is None else microbatches  # an evaluation has no gradients to make room for
    for side, own_key in zip(("query", "positive"), keys):
      x_BD, (more, of_router) = mapped(embedded, batch[side], own_key, number)
      sides.append(x_BD)
      extra += more
      aux = {name: aux.get(name, 0.0) + x for name, x in of_router.items()}
    # `highest`: a product in bfloat16, the usual one on TPUs, is too coarse for a temperature.
    s_BB = jnp.matmul(sides[0], sides[1].T, precision="highest")
    s_BB = jnp.where(weights_B > 0, s_BB / c_objective.similarity_temperature, -jnp.inf)
    rows_B = jnp.arange(len(weights_B))
    nll_B = _nll(s_BB, rows_B, weights_B)
    if c_objective.symmetric:
      t_BB = jnp.where(weights_B > 0, s_BB.T, -jnp.inf)
      nll_B = (nll_B + _nll(t_BB, rows_B, weights_B)) / 2
    loss = nll_B.sum()
    correct = ((s_BB.argmax(-1) == rows_B) * weights_B).sum()
    return loss + extra, weights_B.sum(), {"nll": loss, "correct": correct} | aux

  return loss_fn


def _nll(s_BB: jax.Array, rows_B: jax.Array, weights_B: jax.Array) -> jax.Array:
  """The weighted cross entropy of each row's own column."""
  # A row of padding has no finite column of its own, and must not make a gradient of NaN.
  s_BB = jnp.where((weights_B > 0)[:, None], s_BB, 0.0)
  nll_B, _ = losses.cross_entropy(s_BB, rows_B)
  return nll_B * weights_B


def _check(c: ml_collections.ConfigDict) -> None:
  if c.data.batch_size < 2:
    raise UserError(
      f"data.batch_size={c.data.batch_size}: objective.name={c.objective.name!r} needs other rows "
      "to compare with; set it to 2 or more"
    )


OBJECTIVES.add(
  "contrastive",
  Objective(
    _contrastive,
    layout="retrieval",
    sequences=2,
    head=("pooler", "none"),
    whole_batch=True,
    check=_check,
    summary="embed texts so that pairs are near",
  ),
)
