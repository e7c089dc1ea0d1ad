"""Mixture of experts: each token goes to a few of many MLPs.

B batch, T position, M = B * T tokens, D model, F feed-forward of an expert, E experts, G groups of
experts, X experts a token goes to, C places of an expert in a row (capacity).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxgpt.model import layers, ops
from jaxgpt.model.attention import token_order
from jaxgpt.parallel.sharding import Rules, part, without

Statistics = dict[str, jax.Array]


def route(logits, bias, c_moe):
  """Which experts a token goes to, and with what weight.

  Args:
    logits: float32 [..., E].
    bias: [E] added to the scores in the choice alone (DeepSeek-V3, arXiv:2412.19437, section
      2.1.2), or None.
    c_moe: the config's `model.moe` section.

  Returns:
    (weights, experts, scores): float32 and int32 [..., X]; float32 [..., E].
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


def _best_groups(choice, c_moe):
  """The scores with -inf outside the best groups; a group counts its best expert, or best two.

  DeepSeek-V2 (softmax) takes the best one, V3 (sigmoid) the sum of the best two.
  """
  grouped = choice.reshape(*choice.shape[:-1], c_moe.groups, -1)
  best = jax.lax.top_k(grouped, 1 if c_moe.router == "softmax" else 2)[0].sum(-1)
  _, chosen = jax.lax.top_k(best, c_moe.top_groups)
  kept = jax.nn.one_hot(chosen, c_moe.groups).sum(-2) > 0
  return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)


def statistics(logits_BTE, scores_BTE, experts_BTX, real_BT):
  """Sums over the tokens that are no padding, from which the router's losses are made.

  Returns:
    {'chosen': [E] tokens sent to each expert, 'scores': [E], 'z': sum of log(sum(exp))^2,
    'tokens'}, float32.
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


def losses(stats):
  """(balance, z) of the sums over all layers, each a mean that is of order 1.

  Balance is E * sum(share of the tokens sent to e * mean score of e) (Switch, arXiv:2101.03961,
  eq. 4, in the form of Hugging Face's `load_balancing_loss_func`): the number of experts a token
  goes to where all are used alike, and more where not. z is arXiv:2202.08906, eq. 5.
  """
  tokens = jnp.maximum(stats["tokens"], 1)
  balance = (stats["chosen"] * stats["scores"]).sum() / tokens**2 * stats["chosen"].shape[-1]
  return balance, stats["z"] / tokens


class MoE(layers.Module):
  """Routed experts, and perhaps shared ones that every token goes to.

  With `moe.capacity` = 0 no token is ever dropped: tokens are sorted by expert and multiplied in
  ragged groups. Otherwise an expert has room for capacity * T * X / E tokens of a row; tokens
  beyond that, in the row's order, pass it by, which is what static shapes on many chips cost.
  """

  rules: Rules

  @nn.compact
  def __call__(self, x_BTD, real_BT, lora_key=None):
    """Args: real_BT: False for padding. Returns: (y_BTD, `statistics` and 'dropped')."""
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

  def _activated(self, project):
    act = ops.ACTIVATIONS[self.cfg.activation]
    up = checkpoint_name(project("up"), "up")
    if not self.cfg.gated:
      return act(up)
    return act(checkpoint_name(project("gate"), "gate")) * up

  def _dropless(self, x_BTD, weights, experts, w):
    """Each device sorts its own tokens, and has all experts, or its columns of them."""
    mesh = jax.sharding.get_abstract_mesh()
    several = not mesh.empty and mesh.size > 1
    tokens = self.rules.fitting_spec(mesh, x_BTD.shape[:2], ("batch", "length")) if several else ()
    # Devices with other tokens have nothing to add up: over their axes columns are gathered.
    columns = without(self.rules.mesh_axes("mlp"), tokens)

    def local(x_BTD, weights, experts, w):
      B, T, D = x_BTD.shape
      X, E = experts.shape[-1], self.cfg.moe.experts
      expert = experts.reshape(-1)
      order = jnp.argsort(expert, stable=True)
      rows = x_BTD.reshape(-1, D)[order // X]
      sizes = jnp.bincount(expert, length=E).astype(jnp.int32)
      h = self._activated(lambda name: jax.lax.ragged_dot(rows, w[name], sizes))
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

  def _with_capacity(self, x_BTD, weights, experts, real_BT, w):
    B, T, D = x_BTD.shape
    constrain = self.rules.constrain
    whole = lambda x: constrain(x, "batch", *[None] * (x.ndim - 1))  # rows of one device
    x_BTD, weights, experts, real_BT = map(whole, (x_BTD, weights, experts, real_BT))
    c = self.cfg.moe
    X, E = c.per_token, c.experts
    C = min(math.ceil(c.capacity * T * X / E), T)
    # A token's place among those of its row that go to the same expert, in the row's order.
    as_read, as_here = (
      (token_order.restore, token_order.balance) if self.cfg.causal else (whole, whole)
    )
    wanted_BTXE = jax.nn.one_hot(experts, E, dtype=jnp.int32) * real_BT[..., None, None]
    flat = as_read(wanted_BTXE).reshape(B, T * X, E)
    place = ((jnp.cumsum(flat, 1) - flat) * flat).sum(-1).reshape(B, T, X)
    place = whole(as_here(place))
    wanted = real_BT[..., None] & jnp.ones((X,), bool)
    fits = wanted & (place < C)
    slot = jnp.where(fits, experts * C + place, E * C)  # the last one is thrown away

    def scatter(x_TD, slot_TX):
      rows = jnp.broadcast_to(x_TD[:, None], (T, X, D)).reshape(-1, D)
      return jnp.zeros((E * C + 1, D), x_TD.dtype).at[slot_TX.reshape(-1)].set(rows)[:-1]

    sent = jax.vmap(scatter)(x_BTD, slot).reshape(B, E, C, D)
    sent = constrain(sent, "expert_batch", "experts", None, "act_embed")
    h = self._activated(lambda name: jnp.einsum("BECD,EDF->BECF", sent, w[name]))
    h = constrain(h, "expert_batch", "experts", None, "act_mlp")
    out = jnp.einsum("BECF,EFD->BECD", h, w["down"])
    out = constrain(out, "batch", None, None, "act_embed").reshape(B, E * C, D)
    picked = jax.vmap(lambda rows, at: rows.at[at].get(mode="fill", fill_value=0))(out, slot)
    y = jnp.einsum("BTXD,BTX->BTD", picked, weights.astype(picked.dtype))
    return y, (wanted & ~fits).sum().astype(jnp.float32)
