"""Objectives: the loss functions that a model can be trained on.

The train step, the loop and the evaluation know an objective only as its loss function:

  loss_fn(params, frozen, batch, key) -> (weighted loss sum, weight sum, aux)

`params` are the trained parameters, `frozen` the other parameters of the same tree or None. `key`
is the step's PRNG key, or None in evaluation, which turns dropout off. `aux` is a dict of further
weighted sums, which are reported per weight. All are sums, not means: the train step divides once
by the weight of the global batch, so the result depends neither on the mesh nor on the number of
microbatches.

An entry of `OBJECTIVES` says how to make the loss function, which row layout it reads and which
models it can train.

B batch, T position, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt.config import user_code
from jaxgpt.config.registry import Registry
from jaxgpt.errors import UserError
from jaxgpt.model import lora, moe
from jaxgpt.model.attention import token_order
from jaxgpt.model.transformer import Transformer
from jaxgpt.training import chunked_loss, losses
from jaxgpt.tree import PyTree, map_named, merge

Batch: TypeAlias = dict[str, Any]  # name -> array, or a dict of arrays
Aux: TypeAlias = dict[str, jax.Array]
LossFn: TypeAlias = Callable[
  [PyTree, PyTree | None, Batch, jax.Array | None], tuple[jax.Array, jax.Array, Aux]
]


@dataclasses.dataclass(frozen=True)
class Objective:
  """A training objective.

  Attributes:
    loss_fn: Makes the loss function from the model and the config's `objective` section. Batches
      that it gets have their tokens in the order of `token_order.balance`.
    layout: Name of the row layout it reads, a key of `data.layouts.LAYOUTS`.
    head: The `model.head` that it needs: 'lm' or 'classifier'.
    causal: Whether it needs `model.causal`.
    loss_chunk: Whether it implements `objective.loss_chunk`.
    adapters_only: Whether only LoRA adapters may be trained, since the loss compares the model with
      itself without adapters.
    check: Raises a UserError if the config does not suit it. It gets the whole config, whose
      derived keys may still be None.
    summary: A few words for docs/config.md.
  """

  loss_fn: Callable[[Transformer, ml_collections.ConfigDict], LossFn]
  layout: str = "causal_lm"
  head: str = "lm"
  causal: bool = False
  loss_chunk: bool = False
  adapters_only: bool = False
  check: Callable[[ml_collections.ConfigDict], None] = lambda c: None
  summary: str = ""


OBJECTIVES: Registry[Objective] = Registry("objective.name")


def find(c: ml_collections.ConfigDict) -> Objective:
  """The objective of a config: an entry of `OBJECTIVES`, or an object of a user's file.

  Raises:
    UserError: There is none of that name.
  """
  return user_code.find(OBJECTIVES, Objective, c.objective.name, c.code_folder)


# The output of a model by `model.head`, for messages.
HEADS = {
  "lm": "logits over the vocabulary",
  "classifier": "logits over classes",
  "pooler": "one vector per row, not logits",
  "none": "hidden states, not logits",
}


def head_problem(objective: Objective, c: ml_collections.ConfigDict) -> str:
  """The reason why a model's head gives an objective nothing to compare with its targets, or ''.

  Args:
    objective: The objective, from `find`.
    c: The config, resolved or not.
  """
  m, o = c.model, c.objective
  if m.head == objective.head:
    return ""
  if m.head in ("none", "pooler"):
    return (
      f"model.head={m.head!r}: this model has no head, it gives {HEADS[m.head]}; start a model "
      "with a head from it: jaxgpt train --config=configs/finetune.py:RUN "
      f"--config.model.head={objective.head}"
    )
  fits = [name for name, entry in OBJECTIVES.items() if entry.head == m.head]
  return (
    f"objective.name={o.name!r} needs model.head={objective.head!r}, not {m.head!r}, which gives "
    f"{HEADS[m.head]}; set model.head={objective.head!r}, or objective.name to {' or '.join(fits)}"
  )


def check(c: ml_collections.ConfigDict, for_training: bool = True) -> None:
  """Checks that the objective can train the config's model on its data.

  Args:
    c: The config, resolved or not.
    for_training: False: the model is only used, so it may lack a head for the objective.

  Raises:
    UserError: There is no such objective, or the model or the data does not suit it.
  """
  objective, o, m = find(c), c.objective, c.model
  if objective.causal and not m.causal:
    raise UserError(
      f"objective.name={o.name!r} needs model.causal=True: otherwise each token attends to the one "
      "it predicts"
    )
  if o.loss_chunk and not objective.loss_chunk:
    names = " and ".join(name for name, entry in OBJECTIVES.items() if entry.loss_chunk)
    raise UserError(
      f"objective.loss_chunk={o.loss_chunk} is for {names}, not for objective.name={o.name!r}; set "
      "it to 0"
    )
  if c.data.stream and objective.layout != "causal_lm":
    raise UserError(
      f"data.stream={c.data.stream!r} is for objective.name='causal_lm', not {o.name!r}; prepare "
      "the files with `jaxgpt data`"
    )
  # An imported model may have no head. It can be exported, and a training run can start from it.
  if (problem := head_problem(objective, c)) and (for_training or m.head in ("lm", "classifier")):
    raise UserError(problem)
  objective.check(c)


def check_trained(c: ml_collections.ConfigDict, trained: Collection[str]) -> None:
  """Checks that the objective can train the chosen parameters.

  Args:
    c: A config.
    trained: Paths of the trained parameters, see `optimizers.trained`.

  Raises:
    UserError: The objective needs a fixed reference, but parameters of the reference are trained.
  """
  others = sorted(path for path in trained if not lora.is_adapter(path))
  if find(c).adapters_only and others:
    raise UserError(
      f"objective.name={c.objective.name!r} compares the model with itself without adapters, which "
      f"must stay fixed, but optim.trainable={c.optim.trainable} also trains {', '.join(others)}; "
      "leave optim.trainable out"
    )


def make(model: Transformer, c: ml_collections.ConfigDict) -> LossFn:
  """The loss function of a config, of batches whose tokens are in the order of their rows.

  Args:
    model: A `Transformer`.
    c: A resolved config.
  """
  named = user_code.reading_options(OBJECTIVES.setting, c.objective)
  loss_fn = named(named(find(c).loss_fn)(model, c.objective))
  if not model.cfg.causal:
    return loss_fn
  # Causal attention over mesh.seq needs tokens in an order that gives all devices equal work.
  balanced = lambda x: token_order.balance(x) if x.ndim > 1 else x
  return lambda params, frozen, batch, key: loss_fn(
    params, frozen, jax.tree.map(balanced, batch), key
  )


def _language_model(model: Transformer, c_objective: ml_collections.ConfigDict) -> LossFn:
  """Cross entropy of `targets`, weighted by `loss_weights`, with an optional z-loss.

  loss = sum over tokens of loss_weights * (nll + z_loss * log(Z)^2), see `losses`. Targets that are
  the tokens shifted by one make it next-token prediction. Targets that masks hide make it masked
  language modeling (BERT, arXiv:1810.04805). Layers of experts add their router losses.

  Returns:
    A loss function. Its aux has 'nll', the loss without other terms, and sums of the router.
  """

  def sums(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Any]:
    """(loss, nll, the model's output)."""
    targets_BT, weights_BT = batch["targets"], batch["loss_weights"]
    if c_objective.loss_chunk:
      options = chunked_loss.Options(
        c_objective.loss_chunk,
        model.cfg.logit_softcap,
        c_objective.z_loss,
        model.cfg.grad_dtype == "float32",
        model.rules,
      )
      project = lambda x, w, bias: chunked_loss.loss_sums(
        x, w, bias, targets_BT, weights_BT, options
      )
      out = apply(model, params, frozen, batch, key, project)
      return *out.logits, out
    out = apply(model, params, frozen, batch, key)
    nll_BT, log_z_BT = losses.cross_entropy(out.logits, targets_BT)
    return *losses.weighted_sums(nll_BT, log_z_BT, weights_BT, c_objective.z_loss), out

  def loss_fn(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Aux]:
    weight = batch["loss_weights"].sum()
    loss, nll, out = sums(params, frozen, batch, key)
    extra, aux = router_terms(model, out.router, weight)
    return loss + extra, weight, {"nll": nll} | aux

  return loss_fn


OBJECTIVES.add(
  "causal_lm",
  Objective(_language_model, causal=True, loss_chunk=True, summary="predict the next token"),
)
OBJECTIVES.add(
  "masked_lm",
  Objective(_language_model, layout="masked_lm", loss_chunk=True, summary="predict masked tokens"),
)


def _classification(model: Transformer, c_objective: ml_collections.ConfigDict) -> LossFn:
  """Cross entropy of `labels` [B], or with one label the squared error of a regression.

  Returns:
    A loss function. Its aux has 'nll', sums of the router, and 'correct' if there are classes, or
    'mse' and 'mae', the squared and the absolute error of a regression.
  """
  del c_objective

  def loss_fn(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Aux]:
    out = apply(model, params, frozen, batch, key)
    weights_B, labels_B = batch["loss_weights"], batch["labels"]
    aux = {}
    if model.cfg.num_labels == 1:
      error_B = out.logits[:, 0] - labels_B
      loss_B = jnp.square(error_B)
      aux["mse"] = (loss_B * weights_B).sum()
      aux["mae"] = (jnp.abs(error_B) * weights_B).sum()
    else:
      loss_B, _ = losses.cross_entropy(out.logits, labels_B)
      aux["correct"] = ((out.logits.argmax(-1) == labels_B) * weights_B).sum()
    loss = (loss_B * weights_B).sum()
    extra, of_router = router_terms(model, out.router, weights_B.sum())
    return loss + extra, weights_B.sum(), {"nll": loss} | aux | of_router

  return loss_fn


OBJECTIVES.add(
  "classification",
  Objective(_classification, layout="classification", head="classifier", summary="predict a label"),
)


def _preference(model: Transformer, c_objective: ml_collections.ConfigDict) -> LossFn:
  """Direct preference optimization (arXiv:2305.18290, eq. 7).

  loss = -log sigmoid(beta * (gain of the chosen answer - gain of the rejected answer)), where gain
  is log p_model(answer) - log p_reference(answer). The reference is the model without its adapters
  (LoRA), which are all that is trained. Row i of `batch['chosen']` and of `batch['rejected']` are
  the two answers to one prompt, with weight 1.

  Returns:
    A loss function. Its aux has 'nll' (the loss), 'correct' (the chosen answer gained more) and
    'margin' (beta times the difference of the gains).
  """

  def log_likelihood_B(
    params: PyTree, frozen: PyTree | None, answers: Batch, key: jax.Array | None
  ) -> jax.Array:
    out = apply(model, params, frozen, answers, key)
    nll_BT, _ = losses.cross_entropy(out.logits, answers["targets"])
    return -(nll_BT * answers["loss_weights"]).sum(-1)

  def loss_fn(
    params: PyTree, frozen: PyTree | None, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Aux]:
    reference = jax.lax.stop_gradient(_without_adapters(params))
    margin_B: jax.Array | float = 0.0
    for sign, answers in ((1, batch["chosen"]), (-1, batch["rejected"])):
      margin_B += sign * (
        log_likelihood_B(params, frozen, answers, key)
        - log_likelihood_B(reference, frozen, answers, None)
      )
    weights_B = batch["chosen"]["loss_weights"].max(-1)  # 0 in rows of padding
    loss = (jax.nn.softplus(-c_objective.beta * margin_B) * weights_B).sum()
    aux = {
      "nll": loss,
      "correct": ((margin_B > 0) * weights_B).sum(),
      "margin": (c_objective.beta * margin_B * weights_B).sum(),
    }
    return loss, weights_B.sum(), aux

  return loss_fn


def _without_adapters(params: PyTree) -> PyTree:
  """The parameters with the second LoRA matrices set to 0, which turns the adapters off."""
  zero = lambda path, x: jnp.zeros_like(x) if path.endswith(lora.B) else x
  return map_named(zero, params)


def _check_adapters(c: ml_collections.ConfigDict) -> None:
  if not c.model.lora.rank:
    raise UserError(
      f"objective.name={c.objective.name!r} compares the model with itself without adapters: set "
      "model.lora.rank, such as 16"
    )


OBJECTIVES.add(
  "preference",
  Objective(
    _preference,
    layout="preference",
    causal=True,
    adapters_only=True,
    check=_check_adapters,
    summary="DPO of adapters",
  ),
)


def apply(
  model: Transformer,
  params: PyTree,
  frozen: PyTree | None,
  batch: Batch,
  key: jax.Array | None,
  project: Callable[..., Any] | None = None,
) -> Any:
  """Runs the model on a batch, for a loss function.

  Args:
    model: A `Transformer`.
    params: The trained parameters.
    frozen: The other parameters, or None.
    batch: With `tokens`, `positions`, `segment_ids` and perhaps `token_types`, all [B, T].
    key: PRNG key for dropout, or None.
    project: Replaces the head's product: (hidden states, weight, bias) -> `logits` of the result.

  Returns:
    The model's output, with `logits` (float32) and `router` (statistics for `router_terms`).
  """
  return model.apply(
    {"params": merge(params, frozen)},
    batch["tokens"],
    batch["positions"],
    batch["segment_ids"],
    token_types_BT=batch.get("token_types"),
    dropout_key=key,
    balanced=True,
    project=project,
  )


def router_terms(
  model: Transformer, stats: Any, weight: jax.Array
) -> tuple[jax.Array | float, Aux]:
  """The router's share of the loss in models with experts.

  Args:
    model: A `Transformer`.
    stats: `router` of its output, or None without experts.
    weight: The batch's weight sum.

  Returns:
    (term to add to the loss sum, aux sums), or (0.0, {}) without experts.
  """
  if stats is None:
    return 0.0, {}
  c_moe = model.cfg.moe
  balance, z = moe.losses(stats)
  dropped = stats["dropped"] / jnp.maximum(stats["tokens"] * c_moe.per_token, 1)
  extra = c_moe.balance_loss * balance + c_moe.z_loss * z
  return extra * weight, {
    "router_balance": balance * weight,
    "router_z": z * weight,
    "dropped_share": dropped * weight,
  }
