"""Attention of tokens that are cut over devices: keys and values go around the ring of devices.

While a device's queries read those that are there, the next ones are on their way
(arXiv:2310.01889), for some heads after the others. In local layers only the ends of neighbouring
chunks move: `neighbours`.

B batch, N heads, K key/value heads, T token, H head size; arrays have their tokens on axis 2.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.model.attention import blockwise, context_parallel, halo
from jaxgpt.model.attention.context_parallel import T_AXIS

_HEADS_BYTES = 2**22  # of queries, which read for so long that to start them costs little


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan, q, k, v, ids):
  """Attention of a device's queries to all keys of their rows; inside of `jax.shard_map`.

  Args:
    plan: a `context.Plan`.
    q, k, v: [B, N, T, H] and [B, K, T, H], the device's tokens; queries have their scale already.
    ids: [B, 1, T] segments.

  Returns:
    [B, N, T, H] in q's dtype.
  """
  return _forward(plan, q, k, v, ids)[0]


def _forward(plan, q, k, v, ids):
  run = halo.forward if plan.window is not None else _ring_forward

  def of_heads(q, k, v):
    out, log_z = run(plan, q, k, v, ids)
    return out.astype(q.dtype), log_z

  out, log_z = (checkpoint_name(x, plan.name) for x in _by_heads(of_heads, q, k, v))
  return out, (q, k, v, ids, out, log_z)


def _backward(plan, saved, dout):
  run = halo.backward if plan.window is not None else _ring_backward
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
    early, late = context_parallel.halves(x)
    return self._pair(early, early, late)

  def joined(self, total, part):
    """The (out, log_z) of the `_parts` of the device's queries, with those of `queries` joined."""
    if not self._causal:
      return (blockwise.join(total[0], part),)
    first, at_early, at_late = zip(
      *(self._dealt(x, nothing) for x, nothing in zip(part, (0, blockwise.NOTHING)))
    )
    early, late = total
    return blockwise.join(early, at_early), blockwise.join(blockwise.join(late, first), at_late)

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
    return jnp.concatenate([first + at_early, at_late], T_AXIS)


def _parts(plan, x):
  """The chunks of the device's queries that a `_Visit` tells apart, cut once for all visits."""
  return context_parallel.halves(x) if plan.causal else (x,)


def _shifted(plan, xs):
  """Arrays of the device before this one."""
  ring = [(i, (i + 1) % plan.size) for i in range(plan.size)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, plan.axis, ring), xs)


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
  # In the order of `context.balance` a later token of a device is one that comes later in the row.
  out, log_z = blockwise.forward(plan.kernel, blockwise.Band(plan.causal), q, k, v, ids, ids)

  def visit(carry, s, is_first, is_last):
    del is_first
    there = None if is_last else _shifted(plan, carry[0])
    (k, v, of_keys), total = context_parallel.in_turn(*carry)
    meet = _Visit(plan, s)
    part = blockwise.forward(
      plan.kernel,
      blockwise.Band(),
      meet.queries(q_parts),
      meet.keys(k),
      meet.keys(v),
      meet.queries(ids_parts),
      meet.keys(of_keys),
    )
    return there, meet.joined(total, part)

  q_parts, ids_parts, *own = (_parts(plan, x) for x in (q, ids, out.astype(jnp.float32), log_z))
  _, total = _around(plan.size, visit, (there, tuple(zip(*own))))
  return tuple(jnp.concatenate(x, T_AXIS) for x in zip(*total))


def _ring_backward(plan, q, k, v, ids, out, log_z, dout):
  """Gradients of keys and values travel with them, a step behind, and end at home."""

  def visit(carry, s, is_first, is_last):
    keys, dq, dkv = carry
    there = None if is_last else _shifted(plan, keys)
    dkv = None if is_first else _shifted(plan, dkv)
    keys, dq = context_parallel.in_turn(keys, dq)
    meet = _Visit(plan, s)
    k, v, of_keys = map(meet.keys, keys)
    q_here, ids_here, *saved = map(meet.queries, of_queries)
    got = blockwise.backward(plan.kernel, blockwise.Band(), q_here, k, v, ids_here, of_keys, *saved)
    new = tuple(map(meet.at_keys, got[1:]))
    return there, meet.added(dq, got[0]), new if is_first else jax.tree.map(jnp.add, dkv, new)

  of_queries = [_parts(plan, x) for x in (q, ids, out, log_z, dout)]
  nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in of_queries[0])
  _, dq, dkv = _around(plan.size, visit, (_shifted(plan, (k, v, ids)), nothing, None))
  dq = jnp.concatenate(dq, T_AXIS)
  dk, dv = _shifted(plan, dkv)  # while the device's own are read
  (k, v), dq = context_parallel.in_turn((k, v), dq)
  own = blockwise.backward(
    plan.kernel, blockwise.Band(plan.causal), q, k, v, ids, ids, out, log_z, dout
  )
  return dq + own[0], dk + own[1], dv + own[2]
