"""Experts with a limit on their tokens: each has C slots per row, a static shape.

Within each row, C slots per expert are filled in the order of the tokens. For X = 1, C = 2:

    tokens               t0  t1  t2  t3  t4
    experts               1   0   1   1   0
    place in the queue    0   0   1   2   1     t3 finds expert 1 full: it is dropped
    slots      expert 0: [t1 t4]   expert 1: [t0 t2]

dispatch: gather tokens by slot to [B, E, C, D], sharded over experts (an all-to-all)
combine:  gather results by token and choice, sum over X

The router's weights multiply the hidden activations of the slots, not the results: otherwise their
gradients would need the results, and a backward pass that saved none would compute them again.

TPUs with a SparseCore gather rows there, without cycles of the TensorCore, but do not scatter them
(docs/log.md). So the gradients of both steps are gathers too: only the numbers of the tokens in the
slots are scattered.

B batch, T position, D model, F feed-forward of an expert, E experts, X experts of a token, C slots
of an expert in a row (capacity), S = E C slots of a row.
"""

import functools
import math

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt.model import ops
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
  C = slots(c, T)
  # The place of a token among those of its row that go to the same expert: an exclusive cumsum in
  # the row's own order, which context parallelism has permuted.
  as_read, as_here = (token_order.restore, token_order.balance) if cfg.causal else (whole, whole)
  wanted_BTXE = jax.nn.one_hot(experts, E, dtype=jnp.int32) * real_BT[..., None, None]
  flat = as_read(wanted_BTXE).reshape(B, T * X, E)
  place = ((jnp.cumsum(flat, 1) - flat) * flat).sum(-1).reshape(B, T, X)
  place = whole(as_here(place))
  wanted = real_BT[..., None] & jnp.ones((X,), bool)
  fits = wanted & (place < C)
  slot_BTX = jnp.where(fits, experts * C + place, E * C)  # slot E * C does not exist
  pair_BS = jax.vmap(_pairs, (0, None))(slot_BTX, E * C)
  # Each constraint below is also that of a gradient. With too few, XLA's partitioner gathers
  # the activations of all devices there.
  sent = whole(_dispatched(x_BTD, slot_BTX, pair_BS)).reshape(B, E, C, D)
  sent = constrain(sent, "expert_batch", "experts", None, "act_embed")
  h = activated(lambda name: jnp.einsum("BECD,EDF->BECF", sent, w[name]))
  weight_BS = whole(_of_slots(weights, slot_BTX, pair_BS))
  weight_BEC = constrain(weight_BS.reshape(B, E, C), "expert_batch", "experts", None)
  h = (h * weight_BEC[..., None]).astype(h.dtype)
  h = constrain(h, "expert_batch", "experts", None, "act_mlp")
  h = ops.materialized(h, cfg.materialize)
  out = jnp.einsum("BECF,EFD->BECD", h, w["down"])
  out = constrain(out, "expert_batch", "experts", None, "act_embed")
  out = constrain(out, "batch", None, None, "act_embed").reshape(B, E * C, D)
  y = _combined(out, slot_BTX, pair_BS)
  return y, (wanted & ~fits).sum().astype(jnp.float32)


def slots(c_moe: ml_collections.ConfigDict, seq_len: int) -> int:
  """C, the slots of an expert in a row. `c_moe` is the `model.moe` section."""
  return min(math.ceil(c_moe.capacity * seq_len * c_moe.per_token / c_moe.experts), seq_len)


def _pairs(slot_TX: jax.Array, num_slots: int) -> jax.Array:
  """[S]: the pair t * X + x in each slot of a row, or T X in an empty slot."""
  size = slot_TX.size
  return (
    jnp.full((num_slots,), size, jnp.int32)
    .at[slot_TX.reshape(-1)]
    .set(jnp.arange(size, dtype=jnp.int32), mode="drop")
  )


def _rows(x: jax.Array, at_BM: jax.Array) -> jax.Array:
  """x[b, at[b, m]] for each b and m. An index beyond the end gives the last row."""
  return jax.vmap(lambda x, at: x.at[at].get(mode="clip"))(x, at_BM)


@jax.custom_vjp
def _dispatched(x_BTD: jax.Array, slot_BTX: jax.Array, pair_BS: jax.Array) -> jax.Array:
  """[B, S, D]: the token in each slot. An empty slot has the last token, with the weight 0."""
  return _rows(x_BTD, pair_BS // slot_BTX.shape[-1])


def _dispatched_forward(x_BTD, slot_BTX, pair_BS):
  return _dispatched(x_BTD, slot_BTX, pair_BS), (slot_BTX, pair_BS)


def _dispatched_backward(saved, g_BSD):
  slot_BTX, pair_BS = saved
  return _combined(g_BSD, slot_BTX, pair_BS), None, None


_dispatched.defvjp(_dispatched_forward, _dispatched_backward)


@jax.custom_vjp
def _of_slots(weights_BTX: jax.Array, slot_BTX: jax.Array, pair_BS: jax.Array) -> jax.Array:
  """[B, S]: the weight of the pair in each slot, 0 in an empty slot."""
  B, T, X = weights_BTX.shape
  return jnp.where(pair_BS < T * X, _rows(weights_BTX.reshape(B, -1), pair_BS), 0)


def _of_slots_forward(weights_BTX, slot_BTX, pair_BS):
  return _of_slots(weights_BTX, slot_BTX, pair_BS), slot_BTX


def _of_slots_backward(slot_BTX, g_BS):
  g_BTX = _rows(g_BS, slot_BTX.reshape(slot_BTX.shape[0], -1)).reshape(slot_BTX.shape)
  return jnp.where(slot_BTX < g_BS.shape[1], g_BTX, 0), None, None


_of_slots.defvjp(_of_slots_forward, _of_slots_backward)


@jax.custom_vjp
def _combined(out_BSD: jax.Array, slot_BTX: jax.Array, pair_BS: jax.Array) -> jax.Array:
  """[B, T, D]: the sum of a token's slots, in float32."""
  del pair_BS
  fits_BTX = slot_BTX < out_BSD.shape[1]
  # One gather for each choice: a gather of [B, T, X, D] is not left to the SparseCore.
  choices = [
    jnp.where(fits_BTX[..., x, None], _rows(out_BSD, slot_BTX[..., x]).astype(jnp.float32), 0)
    for x in range(slot_BTX.shape[-1])
  ]
  return functools.reduce(jnp.add, choices).astype(out_BSD.dtype)


def _combined_forward(out_BSD, slot_BTX, pair_BS):
  return _combined(out_BSD, slot_BTX, pair_BS), (slot_BTX, pair_BS)


def _combined_backward(saved, g_BTD):
  # An empty slot has the gradient of the last token. Its hidden activations have the weight 0.
  return _dispatched(g_BTD, *saved), None, None


_combined.defvjp(_combined_forward, _combined_backward)
