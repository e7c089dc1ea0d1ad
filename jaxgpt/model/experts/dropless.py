"""Experts without a limit on their tokens: a grouped matmul over tokens sorted by expert.

The devices of the mesh axes that shard the experts (`mesh.rules.experts`) each hold some of them.
A device sorts its own tokens by expert, sends each to the device that has the expert, and gets the
result back. With E = 4 experts on n = 2 devices, and X = 1:

    device 0                           device 1
    tokens   t0 t1 t2                  tokens   t3 t4 t5
    experts   3  0  1                  experts   2  0  3
    sorted   t1 t2 | t0                sorted   t4 | t3 t5       by device, then expert
    arrived  t1 t2 t4                  arrived  t0 t3 t5         by sender (`exchange`)
    grouped  t1 t4 | t2                grouped  t3 | t0 t5       by expert: a ragged matmul
    and the same way back

Padding is sent nowhere, and its result is zero. The router's weights travel with the tokens and
multiply the hidden activations, not the results: otherwise their gradients would need the results,
and a backward pass that saved none would compute them and send them back again.

B batch, T position, D model, F feed-forward of an expert, X experts of a token, N tokens of a
device, P = N X pairs of a token and an expert, e experts of a device, n devices that exchange
tokens, R rows that a device has room for.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import PartitionSpec as P

from jaxgpt.model.experts import exchange, grouped
from jaxgpt.parallel.sharding import Rules, part, used, without

# f(multiply by the weight of this name) -> hidden activations of the experts
Activated = Callable[[Callable[[str], jax.Array]], jax.Array]


class Counts(NamedTuple):
  """Pairs of a token and an expert, over all devices, as float32 scalars.

  Attributes:
    dropped: Pairs that found no room.
    sent: Pairs that went to another device.
  """

  dropped: jax.Array
  sent: jax.Array


class Layout(NamedTuple):
  """Where the tokens and the experts are on a mesh.

  Attributes:
    tokens: PartitionSpec of [B, T].
    experts: {mesh axis that shards the experts: its size}, in the order of the experts.
    exchanged: Those of them that shard tokens too. The devices of the others hold the same tokens:
      each works on those of its experts, and results are summed.
    columns: Mesh axes that shard the columns of each expert. Results are summed over them.
    platform: Platform of the devices, '' if it is not known.
  """

  tokens: P
  experts: dict[str, int]
  exchanged: tuple[str, ...]
  columns: tuple[str, ...]
  platform: str

  @property
  def devices(self) -> int:
    """n."""
    return math.prod(self.experts[axis] for axis in self.exchanged)


def layout(rules: Rules, shape: tuple[int, ...], num_experts: int) -> Layout:
  """The layout of rows of tokens on the current mesh.

  Args:
    rules: Logical axis rules.
    shape: (B, T). Dimensions that the mesh does not divide are not sharded.
    num_experts: E. If the mesh does not divide them, each device has all.
  """
  mesh = jax.sharding.get_abstract_mesh()
  platform = mesh.abstract_device.platform if mesh.abstract_device else ""
  if mesh.empty or mesh.size == 1:
    return Layout(P(), {}, (), (), platform)
  tokens = rules.fitting_spec(mesh, shape, ("batch", "length"))
  shards = {axis: mesh.shape[axis] for axis in rules.mesh_axes("experts")}
  if num_experts % math.prod(shards.values()):
    shards = {}
  shards = {axis: size for axis, size in shards.items() if size > 1}
  same_tokens = without(shards, tokens)
  # Partial sums over columns must be of the same tokens. So columns are sharded only over mesh
  # axes that do not shard tokens, and are gathered over the others.
  columns = without(rules.mesh_axes("mlp"), tokens)
  return Layout(
    tokens,
    shards,
    tuple(axis for axis in shards if axis not in same_tokens),
    columns,
    platform,
  )


def apply(
  x_BTD: jax.Array,
  weights_BTX: jax.Array,
  experts_BTX: jax.Array,
  real_BT: jax.Array,
  w: dict[str, jax.Array],
  activated: Activated,
  c_moe: ml_collections.FrozenConfigDict,
  rules: Rules,
) -> tuple[jax.Array, Counts]:
  """Applies the experts to their tokens.

  Args:
    x_BTD: Activations.
    weights_BTX: The router's weights.
    experts_BTX: The experts of each token.
    real_BT: False for padding.
    w: {name: weight}, [E, D, F], and [E, F, D] for 'down'.
    activated: Computes hidden activations.
    c_moe: The config's `model.moe` section.
    rules: Logical axis rules.

  Returns:
    (y_BTD, counts).
  """
  at = layout(rules, x_BTD.shape[:2], c_moe.experts)
  mesh = jax.sharding.get_abstract_mesh()

  def local(x_BTD, weights_BTX, experts_BTX, real_BT, w):
    B, T, D = x_BTD.shape
    X = experts_BTX.shape[-1]
    key_P = _keys(at, experts_BTX, real_BT, c_moe.experts)
    tokens_ND, weights_P = x_BTD.reshape(-1, D), weights_BTX.reshape(-1)
    pairs, counts = _on_experts(at, tokens_ND, weights_P, key_P, w, activated, c_moe)
    y_BTD = pairs.reshape(B, T, X, D).sum(2, dtype=jnp.float32).astype(pairs.dtype)
    summed = (*at.columns, *without(at.experts, at.tokens))
    if summed:
      y_BTD = jax.lax.psum(y_BTD, summed)
    return y_BTD, _total(at, counts)

  if not mesh.empty and mesh.size > 1:
    cut, of = part(at.columns), part(tuple(at.experts))
    of_weights = {name: P(of, cut) if name == "down" else P(of, None, cut) for name in w}
    tokens = at.tokens
    local = jax.shard_map(
      local,
      in_specs=(tokens, tokens, tokens, tokens, of_weights),
      out_specs=(tokens, P()),
      check_vma=False,
    )
  return local(x_BTD, weights_BTX, experts_BTX, real_BT, w)


def _total(at: Layout, counts: Counts) -> Counts:
  """Sums over the devices that have other tokens or other experts."""
  axes = (*used(at.tokens), *without(at.experts, at.tokens))
  return jax.lax.psum(counts, axes) if axes else counts


def _keys(at: Layout, experts_BTX: jax.Array, real_BT: jax.Array, num_experts: int) -> jax.Array:
  """[P]: device of the exchange * e + expert of that device, or n e for pairs that stay out.

  Padding stays out, and so do the experts of devices with the same tokens.
  """
  e = num_experts // math.prod(at.experts.values())
  shard, expert = jnp.divmod(experts_BTX, e)
  takes_part = jnp.broadcast_to(real_BT[..., None], shard.shape)
  device, stride = jnp.zeros_like(shard), 1
  for axis, size in reversed(at.experts.items()):
    shard, place = jnp.divmod(shard, size)
    if axis in at.exchanged:
      device += place * stride
      stride *= size
    else:
      takes_part &= place == jax.lax.axis_index(axis)
  return jnp.where(takes_part, device * e + expert, at.devices * e).reshape(-1)


def _on_experts(
  at: Layout,
  x_ND: jax.Array,
  weights_P: jax.Array,
  key_P: jax.Array,
  w: dict[str, jax.Array],
  activated: Activated,
  c_moe: ml_collections.FrozenConfigDict,
) -> tuple[jax.Array, Counts]:
  """[P, D]: each pair's weighted result, zero if it stays out, and the counts of this device."""
  n, e = at.devices, w["up"].shape[0]
  order, place = _sorted(key_P)
  counts = jnp.bincount(key_P, length=n * e + 1)[:-1].astype(jnp.int32).reshape(n, e)
  rows = _copies(x_ND, order, place)
  weights = _permuted(weights_P, order, place)[:, None]
  if n == 1:
    # A ragged matmul leaves rows after the last group undefined, in both directions.
    inside = (jnp.arange(key_P.size) < counts.sum())[:, None]
    rows, weights = (jnp.where(inside, x, 0) for x in (rows, weights))
    out = _multiplied(at, rows, weights, counts[0], w, activated)
    none = jnp.zeros(())
    return _permuted(jnp.where(inside, out, 0), place, order), Counts(none, none)
  tokens, X = x_ND.shape[0], key_P.size // x_ND.shape[0]
  most = tokens * min(X, e)  # of a device, to one device
  room = rows_of_room(tokens, X, n, e, c_moe.buffer)
  group = exchange.Group(at.exchanged, at.platform not in ("cpu", ""), min(most, room))
  plan = exchange.plan(group, counts, room)
  by_expert, back = _sorted(_kinds(plan.counts, room))
  arrived = lambda x: exchange.move(group, x, plan.sent, plan.received, room)
  rows, weights = (_permuted(arrived(x), by_expert, back) for x in (rows, weights))
  out = _multiplied(at, rows, weights, plan.counts.sum(0), w, activated)
  out = exchange.move(group, _permuted(out, back, by_expert), plan.received, plan.sent, key_P.size)
  me = jax.lax.axis_index(group.axes)
  sent = plan.sent.size.sum() - plan.sent.size[me]
  return _permuted(out, place, order), Counts(
    plan.cut.astype(jnp.float32), sent.astype(jnp.float32)
  )


def rows_of_room(tokens: int, X: int, n: int, e: int, buffer: float) -> int:
  """R, the rows that a device has room for.

  Args:
    tokens: N, tokens of a device.
    X: Experts of a token.
    n: Devices that exchange tokens.
    e: Experts of a device.
    buffer: `model.moe.buffer`, room as a multiple of N X, or 0 for the most that can come.
  """
  most = n * tokens * min(X, e)
  return min(most, math.ceil(buffer * tokens * X)) if buffer else most


def _multiplied(
  at: Layout,
  rows: jax.Array,
  weights: jax.Array,
  sizes: jax.Array,
  w: dict[str, jax.Array],
  activated: Activated,
) -> jax.Array:
  """The results of the experts on rows that are grouped by expert, with weights [rows, 1]."""
  h = activated(lambda name: grouped.matmul(rows, w[name], sizes, at.platform))
  return grouped.matmul((h * weights).astype(h.dtype), w["down"], sizes, at.platform)


def _kinds(counts: jax.Array, room: int) -> jax.Array:
  """[R]: the kind of each row, of rows by sender and then kind. Rows after them: e.

  Args:
    counts: [n, e].
    room: R.
  """
  n, e = counts.shape
  kinds = jnp.append(jnp.tile(jnp.arange(e), n), e)
  lengths = jnp.append(counts.reshape(-1), room - counts.sum())
  return jnp.repeat(kinds, lengths, total_repeat_length=room)


def _sorted(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(order, its inverse) of a stable sort."""
  order = jnp.argsort(keys, stable=True)
  return order, jnp.argsort(order)


@jax.custom_vjp
def _permuted(rows: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
  """rows[order] of a permutation. Its gradient is a gather too, where JAX would scatter."""
  del inverse
  return rows[order]


def _permuted_forward(rows, order, inverse):
  return rows[order], (order, inverse)


def _permuted_backward(saved, g):
  return g[saved[1]], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)


@jax.custom_vjp
def _copies(x_ND: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
  """[P, D]: a row for each pair, in the order of a permutation of the pairs."""
  del inverse
  return x_ND[order // (order.size // x_ND.shape[0])]


def _copies_forward(x_ND, order, inverse):
  return _copies(x_ND, order, inverse), (x_ND.shape[0], inverse)


def _copies_backward(saved, g):
  num_tokens, inverse = saved
  pairs = g[inverse].reshape(num_tokens, -1, g.shape[-1])
  return pairs.sum(1, dtype=jnp.float32).astype(g.dtype), None, None


_copies.defvjp(_copies_forward, _copies_backward)
