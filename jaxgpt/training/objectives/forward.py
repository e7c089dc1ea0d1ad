"""The forward pass as the loss functions call it, and the making of a config's loss function."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt.config import user_code
from jaxgpt.config.keys.layer_kinds import mlp_kinds
from jaxgpt.model import fixed_models
from jaxgpt.model.attention import qk_clip, token_order
from jaxgpt.model.experts import router as router_lib
from jaxgpt.model.transformer import Transformer
from jaxgpt.training.objectives.objective import OBJECTIVES, Aux, Batch, LossFn, find
from jaxgpt.tree import PyTree, flatten, map_named, merge


def make(
  model: Transformer, c: ml_collections.ConfigDict, teacher: Transformer | None = None
) -> LossFn:
  """The loss function of a config, of batches whose tokens are in the order of their rows.

  Args:
    model: A `Transformer`.
    c: A resolved config.
    teacher: The teacher's `Transformer`, for objectives that have one.
  """
  named = user_code.reading_options(OBJECTIVES.setting, c.objective)
  entry = find(c)
  more = () if teacher is None else (teacher,)
  number = {"microbatches": c.optim.accumulate} if entry.whole_batch else {}
  loss_fn = named(named(entry.loss_fn)(model, c.objective, *more, **number))
  if not model.cfg.causal:
    return loss_fn
  # Causal attention over mesh.seq needs tokens in an order that gives all devices equal work.
  return lambda params, frozen, batch, key: loss_fn(params, frozen, balanced(batch), key)


def balanced(batch: Batch) -> Batch:
  """A batch with its tokens in the order of `token_order.balance`, as `apply` wants them."""
  has_tokens = lambda name, x: x.ndim > 1 and name != "labels"
  return map_named(lambda name, x: token_order.balance(x) if has_tokens(name, x) else x, batch)


def make_stored(
  model: Transformer, c: ml_collections.ConfigDict
) -> Callable[[PyTree, Batch], dict[str, jax.Array]]:
  """The function that computes what `objective.stored` keeps, see `Objective.stored`.

  Args:
    model: The fixed model.
    c: A resolved config whose objective has a `stored`.
  """
  stored = find(c).stored
  assert stored is not None
  compute = stored.compute(model, c.objective)
  if not model.cfg.causal:
    return compute
  restored = lambda x: token_order.restore(x) if x.ndim > 1 else x
  return lambda params, batch: jax.tree.map(restored, compute(params, balanced(batch)))


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
    frozen: The other parameters, or None. Those of fixed models are left out.
    batch: With `tokens`, `positions`, `segment_ids` and perhaps `token_types`, all [B, T].
    key: PRNG key for dropout, or None.
    project: Replaces the head's product: (hidden states, weight, bias) -> `logits` of the result.

  Returns:
    The model's output, with `logits` (float32) and `router` (statistics for `router_terms`), and
    with `largest_logits` if the model has them.
  """
  run = functools.partial(
    model.apply,
    {"params": fixed_models.split(merge(params, frozen))[0]},
    batch["tokens"],
    batch["positions"],
    batch["segment_ids"],
    token_types_BT=batch.get("token_types"),
    dropout_key=key,
    balanced=True,
    project=project,
  )
  if not model.largest_logits:
    return run()
  out, sown = run(mutable=[qk_clip.LARGEST])
  # A layer sows a tuple of one array: 'layers/attn/largest_logits/0'.
  of_layers = {path.rsplit("/", 2)[0]: x for path, x in flatten(sown[qk_clip.LARGEST]).items()}
  return out._replace(largest_logits=of_layers)


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
  balance, z = router_lib.losses(stats)
  dropped = stats["dropped"] / jnp.maximum(stats["tokens"] * c_moe.per_token, 1)
  extra = c_moe.balance_loss * balance + c_moe.z_loss * z
  aux = {
    "router_balance": balance,
    "router_z": z,
    "router_imbalance": router_lib.imbalance(stats),
    "dropped_share": dropped,
  }
  mesh = jax.sharding.get_abstract_mesh()
  if not c_moe.capacity and not mesh.empty and model.rules.num_shards(mesh, "experts") > 1:
    pair = 2 * model.cfg.width * model.dtype.itemsize  # there and back
    layers = mlp_kinds(model.cfg).count("moe")
    aux["expert_bytes"] = stats["sent"] * pair * layers / jnp.maximum(stats["tokens"], 1)
  return extra * weight, {name: value * weight for name, value in aux.items()}
