"""Distillation: learning the predictions of another language model.

B batch, T position, V vocabulary, K best tokens of the teacher.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.model import fixed_models
from jaxgpt.model.transformer import Transformer
from jaxgpt.parallel import sharding
from jaxgpt.training import losses
from jaxgpt.training.objectives.forward import apply, router_terms
from jaxgpt.training.objectives.objective import OBJECTIVES, Aux, Batch, LossFn, Objective, Stored
from jaxgpt.tree import PyTree, merge


def divergence(
  student_BTV: jax.Array, teacher_BTV: jax.Array, c_objective: ml_collections.ConfigDict
) -> jax.Array:
  """The divergence `objective.divergence` of two softmaxes of logits / temperature, [B, T] in nats.

    forward  KL(teacher || student)     arXiv:1503.02531, section 2
    reverse  KL(student || teacher)     arXiv:2306.08543, eq. 1

  Args:
    student_BTV: Float32 logits.
    teacher_BTV: Float32 logits.
    c_objective: The config's `objective` section.
  """
  student_BTV, teacher_BTV = (x / c_objective.temperature for x in (student_BTV, teacher_BTV))
  if c_objective.divergence == "reverse":
    return losses.kl(student_BTV, teacher_BTV)
  return losses.kl(teacher_BTV, student_BTV)


def _top_k(
  teacher: Transformer, c_objective: ml_collections.ConfigDict
) -> Callable[[PyTree, Batch], dict[str, jax.Array]]:
  """The teacher's K best tokens and their log-probabilities, and that of all others together."""

  def compute(params: PyTree, batch: Batch) -> dict[str, jax.Array]:
    logits_BTV = apply(teacher, params, None, batch, None).logits
    log_p_BTV = jax.nn.log_softmax(logits_BTV / c_objective.temperature)
    ids_BTK = _best_tokens(log_p_BTV, c_objective.top_k)
    return {"teacher_ids": ids_BTK, "teacher_log_p": _outcomes(log_p_BTV, ids_BTK)}

  return compute


def _best_tokens(log_p_BTV: jax.Array, k: int) -> jax.Array:
  """Ids of the k best tokens, [B, T, k]. Each device looks at its own positions.

  XLA's partitioner gathers the operand of `top_k` from all devices, except on TPUs.
  """
  local = lambda log_p: jax.lax.top_k(log_p, k)[1]
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1:
    axes = sharding.FIXED.fitting_spec(mesh, log_p_BTV.shape, ("rows", "length", None))
    local = jax.shard_map(local, in_specs=axes, out_specs=axes, check_vma=False)
  return local(log_p_BTV)


@jax.checkpoint  # the comparisons are cheaper to repeat than to keep
def _outcomes(log_p_BTV: jax.Array, ids_BTK: jax.Array) -> jax.Array:
  """Log-probabilities of K tokens, and of all others together: [B, T, K + 1]."""
  # Comparisons fuse and stay local where V is sharded. Gathers and scatters do neither.
  chosen_BTVK = jnp.arange(log_p_BTV.shape[-1])[:, None] == ids_BTK[:, :, None]
  of_ids_BTK = jnp.where(chosen_BTVK, log_p_BTV[..., None], 0).sum(-2)
  rest_BT = jax.nn.logsumexp(jnp.where(chosen_BTVK.any(-1), -jnp.inf, log_p_BTV), -1)
  return jnp.concatenate([of_ids_BTK, rest_BT[..., None]], -1)


def stored_divergence(
  student_BTV: jax.Array, batch: Batch, c_objective: ml_collections.ConfigDict
) -> jax.Array:
  """`divergence` over K + 1 outcomes: the teacher's K best tokens, and any other token.

  It is at most the divergence over the vocabulary, since it sees less (the data processing
  inequality), and 0 only if both models agree on these outcomes.

  Args:
    student_BTV: Float32 logits.
    batch: With `teacher_ids` [B, T, K] and `teacher_log_p` [B, T, K + 1], see `_top_k`.
    c_objective: The config's `objective` section.
  """
  log_q_BTV = jax.nn.log_softmax(student_BTV / c_objective.temperature)
  log_q, log_p = _outcomes(log_q_BTV, batch["teacher_ids"]), batch["teacher_log_p"]
  if c_objective.divergence == "reverse":
    return (jnp.exp(log_q) * (log_q - log_p)).sum(-1)
  return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def _distillation(
  model: Transformer, c_objective: ml_collections.ConfigDict, teacher: Transformer | None = None
) -> LossFn:
  """Cross entropy mixed with the divergence from a teacher.

    loss = sum over tokens of loss_weights * ((1 - a) nll + a temperature^2 divergence)

  with a = `objective.teacher_share` and `divergence` as above. The factor temperature^2 keeps the
  gradient's size (arXiv:1503.02531, section 2). The teacher is a fixed model and gets no dropout,
  or its best tokens are stored. Without either, in evaluation, only the cross entropy is computed.

  Returns:
    A loss function. Its aux has 'nll', the cross entropy, 'kl', the divergence, and sums of the
    router.
  """
  share = c_objective.teacher_share
  scale = share * c_objective.temperature**2

  def loss_fn(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Aux]:
    out = apply(model, params, frozen, batch, key)
    weights_BT = batch["loss_weights"]
    nll_BT, _ = losses.cross_entropy(out.logits, batch["targets"])
    nll, weight = (nll_BT * weights_BT).sum(), weights_BT.sum()
    extra, of_router = router_terms(model, out.router, weight)
    if teacher is not None:
      theirs = fixed_models.split(merge(params, frozen))[1][fixed_models.TEACHER]
      theirs_BTV = jax.lax.stop_gradient(apply(teacher, theirs, None, batch, None).logits)
      kl_BT = divergence(out.logits, theirs_BTV, c_objective)
    elif "teacher_ids" in batch:
      kl_BT = stored_divergence(out.logits, batch, c_objective)
    else:
      return nll + extra, weight, {"nll": nll} | of_router
    kl = (kl_BT * weights_BT).sum()
    return (1 - share) * nll + scale * kl + extra, weight, {"nll": nll, "kl": kl} | of_router

  return loss_fn


def _check(c: ml_collections.ConfigDict) -> None:
  if not c.objective.teacher:
    raise UserError(
      "objective.name='distillation' needs objective.teacher: the run folder, or the Hugging Face "
      "folder, of the model to learn from"
    )


def _stored_shapes(c: ml_collections.ConfigDict) -> dict[str, tuple[tuple[int, ...], Any]]:
  length, best = c.data.seq_len, c.objective.top_k
  return {
    "teacher_ids": ((length, best), np.int32),
    "teacher_log_p": ((length, best + 1), np.float32),
  }


OBJECTIVES.add(
  "distillation",
  Objective(
    _distillation,
    causal=True,
    check=_check,
    fixed=lambda c: () if c.objective.stored else (fixed_models.TEACHER,),
    stored=Stored(_top_k, _stored_shapes, evaluates=False),
    summary="predict as a teacher does",
  ),
)
