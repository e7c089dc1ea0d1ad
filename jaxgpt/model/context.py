"""Context parallelism: the tokens of a row are cut over devices, and attention joins them again.

With n devices a row is 2n chunks. Under a causal mask device i holds chunks i and 2n-1-i, an early
and a late one (Llama 3, arXiv:2407.21783, section 3.3.2), so that all devices compute equally much;
`balance` puts tokens in that order, once, before the model reads them. Keys and values go around
the ring of devices, and while a device's queries read those that are there, the next ones are on
their way (arXiv:2310.01889), for some heads after the others. In local layers only the ends of
neighbouring chunks move.

B batch, N heads, K key/value heads, T token, H head size; arrays have their tokens on axis 2.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxgpt import sharding
from jaxgpt.model import pairs

_T = 2
_HEADS_BYTES = 2**22  # of queries, which read for so long that to start them costs little


class Plan(NamedTuple):
  """How the tokens of a row meet.

  Attributes:
    kernel: a `pairs.Kernel`.
    causal, window: see `ops.visible`; under a causal mask tokens are in the order of `balance`.
    axis, size: the mesh axis that rows are cut over, and its devices.
    name: of the output and its normaliser, for remat policies.
  """
  kernel: pairs.Kernel
  causal: bool
  window: int | None
  axis: str
  size: int
  name: str


def parts(length):
  """How many devices of the mesh that `jax.set_mesh` has set share a row of so many tokens."""
  mesh = jax.sharding.get_abstract_mesh()
  n = 1 if mesh.empty else sharding.FIXED.num_shards(mesh, "length")
  return n if length % (2 * n) == 0 else 1


def chunks(n, causal):
  """[n, 2]: the two of a row's 2n chunks that each device holds."""
  if not causal:
    return np.arange(2 * n).reshape(n, 2)
  return np.stack([np.arange(n), 2 * n - 1 - np.arange(n)], axis=1)


def balance(x, axis=1):
  """Tokens of rows in the order in which a causal model has them on this mesh.

  Args:
    x: an array with tokens on `axis`, or None.
  """
  return _reordered(x, axis, lambda order: order)


def restore(x, axis=1):
  """The inverse of `balance`."""
  return _reordered(x, axis, np.argsort)


def _reordered(x, axis, which):
  n = 1 if x is None else parts(x.shape[axis])
  if n == 1:
    return x
  cut = x.reshape(*x.shape[:axis], 2 * n, -1, *x.shape[axis + 1:])
  x = jnp.take(cut, which(chunks(n, True).reshape(-1)), axis=axis).reshape(x.shape)
  of_tokens = sharding.FIXED.spec(("length",))[0]
  return jax.lax.with_sharding_constraint(
      x, P(*(of_tokens if i == axis else P.UNCONSTRAINED for i in range(x.ndim))))


def mask_of(plan, ids_BT, all_ids_BS):
  """Which tokens of the whole row each of a device's tokens reads; inside of `jax.shard_map`.

  Args:
    plan: a `Plan`.
    ids_BT, all_ids_BS: segments of the device's tokens, and of all in their order.

  Returns:
    [B, T, S] bool.
  """
  size = ids_BT.shape[1] // 2
  places = chunks(plan.size, plan.causal)[..., None] * size + np.arange(size)
  mine = jnp.asarray(places.reshape(plan.size, -1))[jax.lax.axis_index(plan.axis)]
  distance = mine[:, None] - places.reshape(-1)
  mask = (ids_BT[:, :, None] == all_ids_BS[:, None]) & (all_ids_BS[:, None] != 0)
  if plan.causal:
    mask &= distance >= 0
  return mask if plan.window is None else mask & (jnp.abs(distance) < plan.window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan, q, k, v, ids):
  """Attention of a device's queries to all keys of their rows; inside of `jax.shard_map`.

  Args:
    plan: a `Plan`.
    q, k, v: [B, N, T, H] and [B, K, T, H], the device's tokens; queries have their scale already.
    ids: [B, 1, T] segments.

  Returns:
    [B, N, T, H] in q's dtype.
  """
  return _forward(plan, q, k, v, ids)[0]


def _forward(plan, q, k, v, ids):
  run = _near_forward if plan.window is not None else _ring_forward

  def of_heads(q, k, v):
    out, log_z = run(plan, q, k, v, ids)
    return out.astype(q.dtype), log_z

  out, log_z = (checkpoint_name(x, plan.name) for x in _by_heads(of_heads, q, k, v))
  return out, (q, k, v, ids, out, log_z)


def _backward(plan, saved, dout):
  run = _near_backward if plan.window is not None else _ring_backward
  q, k, v, ids, *of_out = saved

  def of_heads(q, k, v, *of_out):
    grads = run(plan, q, k, v, ids, *of_out)
    return tuple(d.astype(x.dtype) for d, x in zip(grads, (q, k, v)))

  return (*_by_heads(of_heads, q, k, v, *of_out, dout), None)


attend.defvjp(_forward, _backward)


def _by_heads(run, q, k, *others):
  """run(q, k, *others), some heads after the others: it takes memory for those alone.

  Args:
    run: a function of arrays with heads on axis 1, all results such arrays.
    q, k: queries and keys, see `attend`; a key head and the queries that read it stay together.
  """
  K, most = k.shape[1], max(q.size * q.dtype.itemsize // _HEADS_BYTES, 1)
  turns = max(n for n in range(1, K + 1) if K % n == 0 and n <= most)
  if turns == 1:
    return run(q, k, *others)

  def of_turn(i, xs):
    sizes = [x.shape[1] // turns for x in xs]
    return [jax.lax.dynamic_slice_in_dim(x, i * n, n, 1) for x, n in zip(xs, sizes)]

  def turn(i, whole):
    got = run(*of_turn(i, (q, k, *others)))
    put = jax.lax.dynamic_update_slice_in_dim
    return tuple(put(w, x, i * x.shape[1], 1) for w, x in zip(whole, got))

  shapes = jax.eval_shape(lambda: run(*of_turn(0, (q, k, *others))))
  wide = lambda x: (x.shape[0], x.shape[1] * turns, *x.shape[2:])
  return jax.lax.fori_loop(0, turns, turn, tuple(jnp.zeros(wide(x), x.dtype) for x in shapes))


def _halves(x):
  C = x.shape[_T] // 2
  return x[:, :, :C], x[:, :, C:]


class _Visit:
  """The queries and keys that meet when device i has the keys of device i - s.

  Under a causal mask these are two pairs of chunks, wherever the keys are from: the late queries
  read the early keys, and either the early queries do too, or the late ones the late keys. So each
  device does the same work, none of it masked.
  """

  def __init__(self, plan, s):
    self._causal = plan.causal
    self._earlier = jax.lax.axis_index(plan.axis) >= s  # the keys are of chunks before all queries

  def _pair(self, always, early, late):
    """One chunk that always takes part and one of two others, stacked along the batch."""
    return jnp.concatenate([always, jnp.where(self._earlier, early, late)])

  def _dealt(self, pair, nothing):
    """What `_pair` stacked, each in its place: (always, early, late), float32 or `nothing`."""
    always, either = jnp.split(pair.astype(jnp.float32), 2)
    here = self._earlier
    return always, jnp.where(here, either, nothing), jnp.where(here, nothing, either)

  def queries(self, parts):
    """The queries that read, of `_parts`: one or two chunks to the batch."""
    return self._pair(parts[1], *parts) if self._causal else parts[0]

  def keys(self, x):
    """The keys that are read."""
    if not self._causal:
      return x
    early, late = _halves(x)
    return self._pair(early, early, late)

  def joined(self, total, part):
    """The (out, log_z) of the `_parts` of the device's queries, with those of `queries` joined."""
    if not self._causal:
      return (pairs.join(total[0], part),)
    first, at_early, at_late = zip(*(
        self._dealt(x, nothing) for x, nothing in zip(part, (0, pairs.NOTHING))))
    early, late = total
    return pairs.join(early, at_early), pairs.join(pairs.join(late, first), at_late)

  def added(self, parts, d):
    """Sums at the `_parts` of the device's queries, with those at `queries` added."""
    if not self._causal:
      return (parts[0] + d,)
    first, at_early, at_late = self._dealt(d, 0)
    return parts[0] + at_early, parts[1] + first + at_late

  def at_keys(self, d):
    """What is at `keys` at the places of the device's keys, float32."""
    if not self._causal:
      return d.astype(jnp.float32)
    first, at_early, at_late = self._dealt(d, 0)
    return jnp.concatenate([first + at_early, at_late], _T)


def _parts(plan, x):
  """The chunks of the device's queries that a `_Visit` tells apart, cut once for all visits."""
  return _halves(x) if plan.causal else (x,)


def _put_back(take, like, x):
  """The transpose of a linear function: what it has taken back in its place, float32.

  Args:
    take: the function.
    like: an array that it takes from.
    x: what it gave, or the gradient of that.
  """
  whole = jax.ShapeDtypeStruct(like.shape, jnp.float32)
  return jax.linear_transpose(take, whole)(x.astype(jnp.float32))[0]


def _shifted(plan, xs):
  """Arrays of the device before this one."""
  ring = [(i, (i + 1) % plan.size) for i in range(plan.size)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, plan.axis, ring), xs)


def _in_turn(*xs):
  """The same arrays, none before the others: else a compiler runs all blocks before it adds them up,
  and what they give has to fit in memory together."""
  return jax.lax.optimization_barrier(xs)


def _around(n, visit, carry):
  """carry after visit(carry, s, is_first, is_last) for s = 1, …, n - 1; those between are a loop."""
  carry = visit(carry, 1, True, n == 2)
  if n > 3:
    body = lambda carry, s: (visit(carry, s, False, False), None)
    carry, _ = jax.lax.scan(body, carry, jnp.arange(2, n - 1))
  return visit(carry, n - 1, False, True) if n > 2 else carry


def _ring_forward(plan, q, k, v, ids):
  keys = (k, v, ids)
  there = _shifted(plan, keys)  # on their way while the device's own are read
  # In the order of `balance` a later token of a device is one that comes later in the row.
  out, log_z = pairs.forward(plan.kernel, pairs.Band(plan.causal), q, k, v, ids, ids)

  def visit(carry, s, is_first, is_last):
    del is_first
    there = None if is_last else _shifted(plan, carry[0])
    (k, v, of_keys), total = _in_turn(*carry)
    meet = _Visit(plan, s)
    part = pairs.forward(plan.kernel, pairs.Band(), meet.queries(q_parts), meet.keys(k),
                         meet.keys(v), meet.queries(ids_parts), meet.keys(of_keys))
    return there, meet.joined(total, part)

  q_parts, ids_parts, *own = (_parts(plan, x) for x in (q, ids, out.astype(jnp.float32), log_z))
  _, total = _around(plan.size, visit, (there, tuple(zip(*own))))
  return tuple(jnp.concatenate(x, _T) for x in zip(*total))


def _ring_backward(plan, q, k, v, ids, out, log_z, dout):
  """Gradients of keys and values travel with them, a step behind, and end at home."""

  def visit(carry, s, is_first, is_last):
    keys, dq, dkv = carry
    there = None if is_last else _shifted(plan, keys)
    dkv = None if is_first else _shifted(plan, dkv)
    keys, dq = _in_turn(keys, dq)
    meet = _Visit(plan, s)
    k, v, of_keys = map(meet.keys, keys)
    q_here, ids_here, *saved = map(meet.queries, of_queries)
    got = pairs.backward(plan.kernel, pairs.Band(), q_here, k, v, ids_here, of_keys, *saved)
    new = tuple(map(meet.at_keys, got[1:]))
    return there, meet.added(dq, got[0]), new if is_first else jax.tree.map(jnp.add, dkv, new)

  of_queries = [_parts(plan, x) for x in (q, ids, out, log_z, dout)]
  nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in of_queries[0])
  _, dq, dkv = _around(plan.size, visit, (_shifted(plan, (k, v, ids)), nothing, None))
  dq = jnp.concatenate(dq, _T)
  dk, dv = _shifted(plan, dkv)  # while the device's own are read
  (k, v), dq = _in_turn((k, v), dq)
  own = pairs.backward(plan.kernel, pairs.Band(plan.causal), q, k, v, ids, ids, out, log_z, dout)
  return dq + own[0], dk + own[1], dv + own[2]


class _Neighbours:
  """A device's chunks, stacked along the batch, and the ends of those some chunks away.

  The queries of a chunk see `reach` tokens of the chunk `distance` before it (after it where that
  is negative): the last ones, and only its own first queries see them.
  """

  def __init__(self, plan, length, distance):
    self._plan, self._distance = plan, distance
    self._chunks = chunks(plan.size, plan.causal)
    self._size = size = length // 2
    # In whole blocks, of which none is empty.
    block = math.gcd(size, pairs.SPLASH_BLOCK) if plan.kernel.form == "splash" else 1
    left = plan.window - 1 - (abs(distance) - 1) * size  # places beyond the chunk's own border
    self._reach = min(-(-left // block) * block, size)
    away = (abs(distance) - 1) * size + self._reach
    self.band = pairs.Band(plan.causal, plan.window, away if distance > 0 else -away)

  def queries(self, x):
    """Those that see the other chunk; linear."""
    x = jnp.concatenate(_halves(x))
    return x[:, :, :self._reach] if self._distance > 0 else x[:, :, -self._reach:]

  def keys(self, x):
    """The end of the other chunk; zeros where there is none. Linear."""
    end = lambda c: c[:, :, -self._reach:] if self._distance > 0 else c[:, :, :self._reach]
    mine = [end(c) for c in _halves(x)]
    wanted = self._chunks - self._distance
    got = []
    for here in (0, 1):
      moved = []
      for there in (0, 1):
        to, of = np.nonzero(wanted[:, here, None] == self._chunks[None, :, there])
        if len(to):
          way = list(zip(of.tolist(), to.tolist()))
          moved.append(jax.lax.ppermute(mine[there], self._plan.axis, way))
      got.append(sum(moved[1:], moved[0]) if moved else jnp.zeros_like(mine[here]))
    return jnp.concatenate(got)

  def filled(self, x, fill):
    """What `queries` gave, or came of it, and `fill` for the chunks' other queries."""
    rest = self._size - self._reach
    ends = (0, rest) if self._distance > 0 else (rest, 0)
    return jnp.pad(x, [ends if i == _T else (0, 0) for i in range(x.ndim)], constant_values=fill)

  def segments(self, ids):
    """As `keys`, of segments, with `pairs.ABSENT` where there is no other chunk."""
    return self.keys(ids - pairs.ABSENT) + pairs.ABSENT


def _neighbours(plan, length):
  far = min(math.ceil((plan.window - 1) / (length // 2)), 2 * plan.size - 1)
  for distance in range(1, far + 1):
    yield _Neighbours(plan, length, distance)
    if not plan.causal:
      yield _Neighbours(plan, length, -distance)


def _stacked(x):
  return jnp.concatenate(_halves(x))


def _own_band(plan):
  return pairs.Band(plan.causal, plan.window)


def _near_forward(plan, q, k, v, ids):
  met = [(m, m.keys(k), m.keys(v), m.segments(ids)) for m in _neighbours(plan, q.shape[_T])]
  q2, k2, v2, ids2 = map(_stacked, (q, k, v, ids))
  out, log_z = pairs.forward(plan.kernel, _own_band(plan), q2, k2, v2, ids2, ids2)
  total = out.astype(jnp.float32), log_z
  for meet, *keys, of_keys in met:
    keys, total = _in_turn(keys, total)
    part = pairs.forward(plan.kernel, meet.band, meet.queries(q), *keys, meet.queries(ids), of_keys)
    total = pairs.join(total, (meet.filled(part[0], 0), meet.filled(part[1], pairs.NOTHING)))
  return tuple(jnp.concatenate(jnp.split(x, 2), _T) for x in total)


def _near_backward(plan, q, k, v, ids, out, log_z, dout):
  met = [(m, m.keys(k), m.keys(v), m.segments(ids)) for m in _neighbours(plan, q.shape[_T])]
  q2, k2, v2, ids2, *saved = map(_stacked, (q, k, v, ids, out, log_z, dout))
  got = pairs.backward(plan.kernel, _own_band(plan), q2, k2, v2, ids2, ids2, *saved)
  grads = [_put_back(_stacked, x, d) for x, d in zip((q, k, v), got)]
  for meet, *keys, of_keys in met:
    saved = map(meet.queries, (out, log_z, dout))
    got = pairs.backward(plan.kernel, meet.band, meet.queries(q), *keys, meet.queries(ids), of_keys,
                         *saved)
    takes = (meet.queries, meet.keys, meet.keys)
    for i, (take, x, d) in enumerate(zip(takes, (q, k, v), got)):
      grads[i] += _put_back(take, x, d)
  return grads
