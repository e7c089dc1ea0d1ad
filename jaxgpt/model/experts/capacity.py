"""Experts with a limit on their tokens: each has C slots per row, a static shape.

Within each row, C slots per expert are filled in the order of the tokens. For X = 1, C = 2:

    tokens               t0  t1  t2  t3  t4
    experts               1   0   1   1   0
    place in the queue    0   0   1   2   1     t3 finds expert 1 full: it is dropped
    slots      expert 0: [t1 t4]   expert 1: [t0 t2]

dispatch: scatter tokens to [B, E, C, D], sharded over experts (an all-to-all)
combine:  gather results by slot, weight by the router, sum over X

B batch, T position, D model, F feed-forward of an expert, E experts, X experts of a token, C slots
of an expert in a row (capacity).
"""

import math

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt.model.attention import token_order
from jaxgpt.model.experts.dropless import Activated
from jaxgpt.parallel.sharding import Rules


def apply(
  x_BTD: jax.Array,
  weights: jax.Array,
  experts: jax.Array,
  real_BT: jax.Array,
  w: dict[str, jax.Array],
  activated: Activated,
  cfg: ml_collections.FrozenConfigDict,
  rules: Rules,
) -> tuple[jax.Array, jax.Array]:
  """Dispatches tokens to the slots of their experts, and combines what comes back.

  Args:
    x_BTD: Activations.
    weights: [B, T, X], the router's weights.
    experts: [B, T, X], the experts of each token.
    real_BT: False for padding.
    w: {name: weight}, [E, D, F], and [E, F, D] for 'down'.
    activated: Computes hidden activations.
    cfg: The config's `model` section.
    rules: Logical axis rules.

  Returns:
    (y_BTD, number of (token, expert) pairs that were dropped).
  """
  B, T, D = x_BTD.shape
  constrain = rules.constrain
  whole = lambda x: constrain(x, "batch", *[None] * (x.ndim - 1))  # whole rows on a device
  x_BTD, weights, experts, real_BT = map(whole, (x_BTD, weights, experts, real_BT))
  c = cfg.moe
  X, E = c.per_token, c.experts
  C = min(math.ceil(c.capacity * T * X / E), T)
  # The place of a token among those of its row that go to the same expert: an exclusive cumsum in
  # the row's own order, which context parallelism has permuted.
  as_read, as_here = (token_order.restore, token_order.balance) if cfg.causal else (whole, whole)
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
  h = activated(lambda name: jnp.einsum("BECD,EDF->BECF", sent, w[name]))
  h = constrain(h, "expert_batch", "experts", None, "act_mlp")
  out = jnp.einsum("BECF,EFD->BECD", h, w["down"])
  out = constrain(out, "batch", None, None, "act_embed").reshape(B, E * C, D)
  picked = jax.vmap(lambda out, at: out.at[at].get(mode="fill", fill_value=0))(out, slot)
  y = jnp.einsum("BTXD,BTX->BTD", picked, weights.astype(picked.dtype))
  return y, (wanted & ~fits).sum().astype(jnp.float32)
