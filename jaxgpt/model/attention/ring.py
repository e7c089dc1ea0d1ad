"""Ring attention: keys and values of a sharded row travel around the ring of devices.

Each device keeps its queries. At step s it holds the keys of the device s places before it,
computes their block, merges the result (`blockwise.merge`) and meanwhile passes them on
(arXiv:2310.01889):

            device 0    device 1    device 2    device 3
  step 0    q0 x k0     q1 x k1     q2 x k2     q3 x k3
  step 1    q0 x k3     q1 x k0     q2 x k1     q3 x k2
  step 2    q0 x k2     q1 x k3     q2 x k0     q3 x k1
  step 3    q0 x k1     q1 x k2     q2 x k3     q3 x k0

In the backward pass the gradients of keys and values travel along with them, and one more step
returns them to their owner. Heads are processed in groups, to bound memory. Layers with a window
send only the ends of chunks, see `halo`.

B batch, N heads, K key/value heads, T token, H head size, with tokens on axis 2.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.config.remat import ATTENTION
from jaxgpt.model.attention import blockwise, halo
from jaxgpt.model.attention.masks import Band
from jaxgpt.model.attention.spec import Block, BlockOutput, ContextParallel
from jaxgpt.model.attention.token_order import T_AXIS, halves
from jaxgpt.tree import PyTree

# Bytes of the queries in one group of heads: large enough that the cost of starting a group is
# small.
_GROUP_BYTES = 2**22

_Chunks = tuple[jax.Array, ...]  # (early, late) under a causal mask, else (all tokens,)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
  cp: ContextParallel, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array
) -> jax.Array:
  """Computes attention of a device's queries to all keys of their rows, under `jax.shard_map`.

  Args:
    cp: How rows are sharded.
    q: This device's queries [B, N, T, H], already scaled.
    k: This device's keys [B, K, T, H].
    v: This device's values [B, K, T, H].
    ids: Segments of this device's tokens, [B, 1, T].

  Returns:
    [B, N, T, H] in q's dtype.
  """
  return _forward(cp, q, k, v, ids)[0]


def _forward(
  cp: ContextParallel, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array
) -> tuple[jax.Array, tuple]:
  run = halo.forward if cp.spec.window is not None else _ring_forward

  def of_heads(q, k, v):
    out, log_z = run(cp, q, k, v, ids)
    return out.astype(q.dtype), log_z

  out, log_z = (checkpoint_name(x, ATTENTION) for x in _by_heads(of_heads, q, k, v))
  return out, (q, k, v, ids, out, log_z)


def _backward(cp: ContextParallel, saved: tuple, dout: jax.Array) -> tuple:
  run = halo.backward if cp.spec.window is not None else _ring_backward
  q, k, v, ids, out, log_z = saved

  def of_heads(q, k, v, out, log_z, dout):
    grads = run(cp, (q, k, v), ids, BlockOutput(out, log_z), dout)
    return tuple(d.astype(x.dtype) for d, x in zip(grads, (q, k, v), strict=True))

  return (*_by_heads(of_heads, q, k, v, out, log_z, dout), None)


attend.defvjp(_forward, _backward)


def _by_heads(run: Callable, q: jax.Array, k: jax.Array, *others: jax.Array) -> tuple:
  """Computes run(q, k, *others) in a loop over groups of heads, which bounds its memory.

  Args:
    run: Function of arrays with heads on axis 1, whose results have them there too.
    q: Queries, see `attend`.
    k: Keys. A key head stays with the query heads that read it.
    *others: Further arrays.
  """
  K, most = k.shape[1], max(q.size * q.dtype.itemsize // _GROUP_BYTES, 1)
  groups = max(n for n in range(1, K + 1) if K % n == 0 and n <= most)
  if groups == 1:
    return run(q, k, *others)

  def of_group(i, xs):
    sizes = [x.shape[1] // groups for x in xs]
    return [jax.lax.dynamic_slice_in_dim(x, i * n, n, 1) for x, n in zip(xs, sizes, strict=True)]

  def one(i, whole):
    got = run(*of_group(i, (q, k, *others)))
    put = jax.lax.dynamic_update_slice_in_dim
    return tuple(put(w, x, i * x.shape[1], 1) for w, x in zip(whole, got, strict=True))

  # Results are written into buffers that the loop carries.
  shapes = jax.eval_shape(lambda: run(*of_group(0, (q, k, *others))))
  wide = lambda x: (x.shape[0], x.shape[1] * groups, *x.shape[2:])
  return jax.lax.fori_loop(0, groups, one, tuple(jnp.zeros(wide(x), x.dtype) for x in shapes))


class _Visit:
  """Step s of the ring: device i has the keys of device j = i - s (modulo n).

  Without a causal mask all queries attend to all keys. With it, both devices hold one early and one
  late chunk of the row: i and 2n-1-i, j and 2n-1-j. Exactly two of the four pairs of chunks are
  visible, and they are visible entirely:

                     j before i (i >= s)          j after i (i < s)
                    early keys  late keys        early keys  late keys
    early queries       X           .                .           .
    late queries        X           .                X           X

  The late queries always attend to the early keys. The second pair depends on the device. The two
  pairs are stacked along the batch, so that each device computes the same shape, without a mask and
  without wasted work.
  """

  def __init__(self, cp: ContextParallel, s: int | jax.Array):
    self._causal = cp.spec.causal
    self._keys_before = jax.lax.axis_index(cp.axis) >= s

  def _pair(self, always: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
    """Stacks the chunk of the first pair and that of the second, by where the keys are from."""
    return jnp.concatenate([always, jnp.where(self._keys_before, before, after)])

  def _unpair(self, pair: jax.Array, empty: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inverts `_pair`: (always, before, after) in float32, with `empty` for the absent one."""
    always, second = jnp.split(pair.astype(jnp.float32), 2)
    before = self._keys_before
    return always, jnp.where(before, second, empty), jnp.where(before, empty, second)

  def queries(self, chunks: _Chunks) -> jax.Array:
    """The queries that attend, from `_chunks`."""
    return self._pair(chunks[1], *chunks) if self._causal else chunks[0]

  def keys(self, x: jax.Array) -> jax.Array:
    """The keys that are attended to."""
    if not self._causal:
      return x
    early, late = halves(x)
    return self._pair(early, early, late)

  def merge(self, total: tuple[BlockOutput, ...], found: BlockOutput) -> tuple[BlockOutput, ...]:
    """Merges this step's outputs over `queries` into those of the device's chunks."""
    if not self._causal:
      return (blockwise.merge(total[0], found),)
    first, at_early, at_late = (
      BlockOutput(*x)
      for x in zip(
        *(self._unpair(x, empty) for x, empty in zip(found, (0, blockwise.NO_LOG_Z), strict=True)),
        strict=True,
      )
    )
    early, late = total
    return (
      blockwise.merge(early, at_early),
      blockwise.merge(blockwise.merge(late, first), at_late),
    )

  def add_to_queries(self, chunks: _Chunks, d: jax.Array) -> _Chunks:
    """Adds gradients of `queries` to those of the device's chunks."""
    if not self._causal:
      return (chunks[0] + d,)
    first, at_early, at_late = self._unpair(d, 0)
    return chunks[0] + at_early, chunks[1] + first + at_late

  def to_keys(self, d: jax.Array) -> jax.Array:
    """Gradients of `keys` as gradients of all keys, in float32."""
    if not self._causal:
      return d.astype(jnp.float32)
    first, at_early, at_late = self._unpair(d, 0)
    return jnp.concatenate([first + at_early, at_late], T_AXIS)


def _chunks(cp: ContextParallel, x: jax.Array) -> _Chunks:
  """The chunks of a device's queries that a `_Visit` tells apart, cut once for all steps."""
  return halves(x) if cp.spec.causal else (x,)


def _passed_on(cp: ContextParallel, xs: PyTree) -> PyTree:
  """The arrays of the previous device in the ring."""
  ring = [(i, (i + 1) % cp.size) for i in range(cp.size)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, cp.axis, ring), xs)


def _around(n: int, visit: Callable, carry: Any) -> Any:
  """Applies visit(carry, s, is_first, is_last) for s = 1, ..., n - 1, by a scan in between."""
  carry = visit(carry, 1, True, n == 2)
  if n > 3:
    body = lambda carry, s: (visit(carry, s, False, False), None)
    carry, _ = jax.lax.scan(body, carry, jnp.arange(2, n - 1))
  return visit(carry, n - 1, False, True) if n > 2 else carry


def _ring_forward(
  cp: ContextParallel, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array
) -> BlockOutput:
  keys = (k, v, ids)
  following = _passed_on(cp, keys)  # in flight while the device computes its own block
  # In the balanced order a later token of a device is also later in the row, so the device's own
  # block has a plain causal mask.
  own = blockwise.forward(cp, Band(cp.spec.causal), Block(q, k, v, ids, ids))

  # The keys for the next step are sent before this step's block is computed, so that communication
  # and compute overlap.
  def visit(carry, s, is_first, is_last):
    del is_first
    following = None if is_last else _passed_on(cp, carry[0])
    (k, v, k_ids), total = blockwise.in_sequence(*carry)
    step = _Visit(cp, s)
    block = Block(
      step.queries(q_chunks), step.keys(k), step.keys(v), step.queries(id_chunks), step.keys(k_ids)
    )
    return following, step.merge(total, blockwise.forward(cp, Band(), block))

  q_chunks, id_chunks, *own_chunks = (
    _chunks(cp, x) for x in (q, ids, own.out.astype(jnp.float32), own.log_z)
  )
  total = tuple(BlockOutput(*x) for x in zip(*own_chunks, strict=True))
  _, total = _around(cp.size, visit, (following, total))
  return BlockOutput(*(jnp.concatenate(x, T_AXIS) for x in zip(*total, strict=True)))


def _ring_backward(
  cp: ContextParallel,
  qkv: tuple[jax.Array, jax.Array, jax.Array],
  ids: jax.Array,
  total: BlockOutput,
  dout: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of q, k and v. Those of keys and values travel with them, one step behind."""
  q, k, v = qkv

  # dkv belongs to the keys of the previous step. It follows them to the device that visits them
  # now, which adds its own share.
  def visit(carry, s, is_first, is_last):
    keys, dq, dkv = carry
    following = None if is_last else _passed_on(cp, keys)
    dkv = None if is_first else _passed_on(cp, dkv)
    keys, dq = blockwise.in_sequence(keys, dq)
    step = _Visit(cp, s)
    k, v, k_ids = map(step.keys, keys)
    q_here, ids_here, out, log_z, d = map(step.queries, of_queries)
    block = Block(q_here, k, v, ids_here, k_ids)
    found = blockwise.backward(cp, Band(), block, BlockOutput(out, log_z), d)
    new = tuple(map(step.to_keys, found[1:]))
    return (
      following,
      step.add_to_queries(dq, found[0]),
      new if is_first else jax.tree.map(jnp.add, dkv, new),
    )

  of_queries = [_chunks(cp, x) for x in (q, ids, *total, dout)]
  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in of_queries[0])
  _, dq_chunks, dkv = _around(cp.size, visit, (_passed_on(cp, (k, v, ids)), zeros, None))
  dq = jnp.concatenate(dq_chunks, T_AXIS)
  # The last hop home, in flight while the device computes its own block.
  dk, dv = _passed_on(cp, dkv)
  (k, v), dq = blockwise.in_sequence((k, v), dq)
  own = blockwise.backward(cp, Band(cp.spec.causal), Block(q, k, v, ids, ids), total, dout)
  return dq + own[0], dk + own[1], dv + own[2]
