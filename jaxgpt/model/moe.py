"""Mixture of experts: a router sends each token to a few of many MLPs.

B batch, T position, D model, F feed-forward of an expert, E experts, X experts of a token, C slots
of an expert in a row (capacity).
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxgpt.config.remat import GATE, UP
from jaxgpt.model import layers, ops
from jaxgpt.model.attention import token_order
from jaxgpt.parallel.sharding import Rules, part, without

# Sums over the tokens that are not padding, float32:
#   chosen   [E] tokens sent to each expert
#   scores   [E] router scores
#   z        log(sum(exp(logits)))^2
#   tokens   number of tokens
#   dropped  tokens times experts that had no slot for them
Statistics = dict[str, jax.Array]


def route(
  logits: jax.Array, bias: jax.Array | None, c_moe: ml_collections.FrozenConfigDict
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Chooses the experts of each token and their weights.

  Args:
    logits: float32 [..., E].
    bias: [E], added to the scores for the choice only (DeepSeek-V3, arXiv:2412.19437, section
      2.1.2), or None.
    c_moe: The config's `model.moe` section.

  Returns:
    (weights, experts, scores): float32 [..., X], int32 [..., X] and float32 [..., E].
  """
  scores = jax.nn.softmax(logits) if c_moe.router == "softmax" else jax.nn.sigmoid(logits)
  choice = scores if bias is None else scores + bias
  if c_moe.groups > 1:
    choice = _best_groups(choice, c_moe)
  _, experts = jax.lax.top_k(choice, c_moe.per_token)
  weights = jnp.take_along_axis(scores, experts, axis=-1)
  if c_moe.normalize:
    weights /= weights.sum(-1, keepdims=True) + 1e-20
  return weights * c_moe.scale, experts, scores


def _best_groups(choice: jax.Array, c_moe: ml_collections.FrozenConfigDict) -> jax.Array:
  """Scores with -inf outside the best groups of experts.

  A group is rated by its best expert in DeepSeek-V2 (softmax), by the sum of its best two in
  DeepSeek-V3 (sigmoid).
  """
  grouped = choice.reshape(*choice.shape[:-1], c_moe.groups, -1)
  best = jax.lax.top_k(grouped, 1 if c_moe.router == "softmax" else 2)[0].sum(-1)
  _, chosen = jax.lax.top_k(best, c_moe.top_groups)
  kept = jax.nn.one_hot(chosen, c_moe.groups).sum(-2) > 0
  return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)


def statistics(
  logits_BTE: jax.Array, scores_BTE: jax.Array, experts_BTX: jax.Array, real_BT: jax.Array
) -> Statistics:
  """The sums that the router losses are computed from. See `Statistics`, without 'dropped'.

  Args:
    logits_BTE: Router logits.
    scores_BTE: Router scores.
    experts_BTX: Experts of each token.
    real_BT: False for padding.
  """
  E = logits_BTE.shape[-1]
  real = real_BT.astype(jnp.float32)
  chosen_BTE = jax.nn.one_hot(experts_BTX, E).sum(-2)
  z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
  return {
    "chosen": jnp.einsum("BT,BTE->E", real, chosen_BTE),
    "scores": jnp.einsum("BT,BTE->E", real, scores_BTE),
    "z": (z_BT * real).sum(),
    "tokens": real.sum(),
  }


def losses(stats: Statistics) -> tuple[jax.Array, jax.Array]:
  """Router losses, from the statistics summed over all layers. Each is a mean of order 1.

  The balance loss is E * sum over experts e of (share of tokens sent to e * mean score of e)
  (Switch, arXiv:2101.03961, eq. 4, in the form of Hugging Face's `load_balancing_loss_func`). It is
  the number of experts per token if all are used equally, and larger otherwise. The z loss is
  arXiv:2202.08906, eq. 5.

  Returns:
    (balance loss, z loss).
  """
  tokens = jnp.maximum(stats["tokens"], 1)
  balance = (stats["chosen"] * stats["scores"]).sum() / tokens**2 * stats["chosen"].shape[-1]
  return balance, stats["z"] / tokens


class MoE(layers.Module):
  """Routed experts, and optionally shared experts that every token goes to.

  With `moe.capacity` = 0 no token is dropped: tokens are sorted by expert and multiplied by a
  ragged matmul. Otherwise each expert has C = capacity * T * X / E slots per row. Tokens of the row
  that find them full skip this expert. That is the price of static shapes, which let experts be
  sharded over many chips.

  Attributes:
    rules: Logical axis rules.
  """

  rules: Rules

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, real_BT: jax.Array, lora_key: jax.Array | None = None
  ) -> tuple[jax.Array, Statistics]:
    """Applies the experts.

    Args:
      x_BTD: Activations.
      real_BT: False for padding.
      lora_key: PRNG key of adapter dropout in the shared experts, or None.

    Returns:
      (y_BTD, statistics).
    """
    cfg, c = self.cfg, self.cfg.moe
    D, E, F = cfg.width, c.experts, c.width
    router = self.weight("router", (D, E), ("embed", "router"), cfg.init_std)
    bias = self.vector("router_bias", (E,), ("norm",)) if c.router == "sigmoid" else None
    logits_BTE = x_BTD.astype(jnp.float32) @ router
    weights, experts, scores = route(logits_BTE, bias, c)
    stats = statistics(logits_BTE, scores, experts, real_BT)
    std = {"gate": cfg.init_std, "up": cfg.init_std, "down": self.residual_std}
    names = ("gate", "up", "down") if cfg.gated else ("up", "down")
    w = {
      name: self.weight(
        name,
        (E, F, D) if name == "down" else (E, D, F),
        ("experts", "mlp", "embed") if name == "down" else ("experts", "embed", "mlp"),
        std[name],
      ).astype(self.dtype)
      for name in names
    }
    if c.capacity:
      y, stats["dropped"] = self._with_capacity(x_BTD, weights, experts, real_BT, w)
    else:
      y, stats["dropped"] = self._dropless(x_BTD, weights, experts, w), jnp.zeros(())
    if c.shared:
      y += layers.MLP(cfg, self.rules, c.shared * F, name="shared")(x_BTD, lora_key)
    return y, stats

  def _activated(self, project: Callable[[str], jax.Array]) -> jax.Array:
    """Hidden activations of the experts. `project` multiplies by the weight of that name."""
    act = ops.ACTIVATIONS[self.cfg.activation]
    up = checkpoint_name(project(UP), UP)
    if not self.cfg.gated:
      return act(up)
    return act(checkpoint_name(project(GATE), GATE)) * up

  def _dropless(
    self, x_BTD: jax.Array, weights: jax.Array, experts: jax.Array, w: dict[str, jax.Array]
  ) -> jax.Array:
    """Multiplies tokens, sorted by expert, with a ragged matmul.

    Each device sorts its own tokens. It has all experts, or a shard of the columns of each:

      tokens       t0    t1    t2          (X = 2 experts each)
      experts      2 0   1 2   0 1
      sorted       t0 t2 | t1 t2 | t0 t1   rows of experts 0 | 1 | 2: one ragged matmul
      scattered back to (token, choice), then summed with the router weights
    """
    mesh = jax.sharding.get_abstract_mesh()
    several = not mesh.empty and mesh.size > 1
    tokens = self.rules.fitting_spec(mesh, x_BTD.shape[:2], ("batch", "length")) if several else P()
    # Partial sums over columns must be of the same tokens. So columns are sharded only over mesh
    # axes that do not shard tokens, and are gathered over the others.
    columns = without(self.rules.mesh_axes("mlp"), tokens)

    def local(x_BTD, weights, experts, w):
      B, T, D = x_BTD.shape
      X, E = experts.shape[-1], self.cfg.moe.experts
      expert = experts.reshape(-1)  # of each (token, choice)
      order = jnp.argsort(expert, stable=True)
      sent = x_BTD.reshape(-1, D)[order // X]
      sizes = jnp.bincount(expert, length=E).astype(jnp.int32)
      h = self._activated(lambda name: jax.lax.ragged_dot(sent, w[name], sizes))
      out = jax.lax.ragged_dot(h, w["down"], sizes)
      out = jnp.zeros_like(out).at[order].set(out).reshape(B, T, X, D)
      y = jnp.einsum("BTXD,BTX->BTD", out, weights.astype(out.dtype))
      return jax.lax.psum(y, columns) if several and columns else y

    if several:
      cut = part(columns)
      of_weights = {name: P(None, cut) if name == "down" else P(None, None, cut) for name in w}
      local = jax.shard_map(
        local, in_specs=(tokens, tokens, tokens, of_weights), out_specs=tokens, check_vma=False
      )
    return local(x_BTD, weights, experts, w)

  def _with_capacity(
    self,
    x_BTD: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    real_BT: jax.Array,
    w: dict[str, jax.Array],
  ) -> tuple[jax.Array, jax.Array]:
    """Dispatches tokens to the slots of their experts, and combines what comes back.

    Within each row, C slots per expert are filled in the order of the tokens. For X = 1, C = 2:

      tokens               t0  t1  t2  t3  t4
      experts               1   0   1   1   0
      place in the queue    0   0   1   2   1     t3 finds expert 1 full: it is dropped
      slots      expert 0: [t1 t4]   expert 1: [t0 t2]

    dispatch: scatter tokens to [B, E, C, D], sharded over experts (an all-to-all)
    combine:  gather results by slot, weight by the router, sum over X

    Returns:
      (y_BTD, number of (token, expert) pairs that were dropped).
    """
    B, T, D = x_BTD.shape
    constrain = self.rules.constrain
    whole = lambda x: constrain(x, "batch", *[None] * (x.ndim - 1))  # whole rows on a device
    x_BTD, weights, experts, real_BT = map(whole, (x_BTD, weights, experts, real_BT))
    c = self.cfg.moe
    X, E = c.per_token, c.experts
    C = min(math.ceil(c.capacity * T * X / E), T)
    # The place of a token among those of its row that go to the same expert: an exclusive cumsum in
    # the row's own order, which context parallelism has permuted.
    as_read, as_here = (
      (token_order.restore, token_order.balance) if self.cfg.causal else (whole, whole)
    )
    wanted_BTXE = jax.nn.one_hot(experts, E, dtype=jnp.int32) * real_BT[..., None, None]
    flat = as_read(wanted_BTXE).reshape(B, T * X, E)
    place = ((jnp.cumsum(flat, 1) - flat) * flat).sum(-1).reshape(B, T, X)
    place = whole(as_here(place))
    wanted = real_BT[..., None] & jnp.ones((X,), bool)
    fits = wanted & (place < C)
    slot = jnp.where(fits, experts * C + place, E * C)  # slot E * C is discarded

    def scatter(x_TD, slot_TX):
      copies = jnp.broadcast_to(x_TD[:, None], (T, X, D)).reshape(-1, D)
      return jnp.zeros((E * C + 1, D), x_TD.dtype).at[slot_TX.reshape(-1)].set(copies)[:-1]

    sent = jax.vmap(scatter)(x_BTD, slot).reshape(B, E, C, D)
    sent = constrain(sent, "expert_batch", "experts", None, "act_embed")
    h = self._activated(lambda name: jnp.einsum("BECD,EDF->BECF", sent, w[name]))
    h = constrain(h, "expert_batch", "experts", None, "act_mlp")
    out = jnp.einsum("BECF,EFD->BECD", h, w["down"])
    out = constrain(out, "batch", None, None, "act_embed").reshape(B, E * C, D)
    picked = jax.vmap(lambda out, at: out.at[at].get(mode="fill", fill_value=0))(out, slot)
    y = jnp.einsum("BTXD,BTX->BTD", picked, weights.astype(picked.dtype))
    return y, (wanted & ~fits).sum().astype(jnp.float32)
