"""Attention of tokens that are cut over devices within a window: neighbouring chunks lend their ends.

Names and axes are those of `ring`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.model.attention import blockwise, context_parallel
from jaxgpt.model.attention.context_parallel import T_AXIS
from jaxgpt.parallel import chips


class _Neighbours:
  """A device's chunks, stacked along the batch, and the ends of those some chunks away.

  The queries of a chunk see `reach` tokens of the chunk `distance` before it (after it where that
  is negative): the last ones, and only its own first queries see them.
  """

  def __init__(self, plan, length, distance):
    self._plan, self._distance = plan, distance
    self._chunks = context_parallel.chunks(plan.size, plan.causal)
    self._size = size = length // 2
    # In whole blocks, of which none is empty.
    block = math.gcd(size, chips.attention_block()) if plan.kernel.form == "splash" else 1
    left = plan.window - 1 - (abs(distance) - 1) * size  # places beyond the chunk's own border
    self._reach = min(-(-left // block) * block, size)
    away = (abs(distance) - 1) * size + self._reach
    self.band = blockwise.Band(plan.causal, plan.window, away if distance > 0 else -away)

  def queries(self, x):
    """Those that see the other chunk; linear."""
    x = jnp.concatenate(context_parallel.halves(x))
    return x[:, :, : self._reach] if self._distance > 0 else x[:, :, -self._reach :]

  def keys(self, x):
    """The end of the other chunk; zeros where there is none. Linear."""
    end = lambda c: c[:, :, -self._reach :] if self._distance > 0 else c[:, :, : self._reach]
    mine = [end(c) for c in context_parallel.halves(x)]
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
    return jnp.pad(
      x, [ends if i == T_AXIS else (0, 0) for i in range(x.ndim)], constant_values=fill
    )

  def segments(self, ids):
    """As `keys`, of segments, with `pairs.ABSENT` where there is no other chunk."""
    return self.keys(ids - blockwise.ABSENT) + blockwise.ABSENT


def _put_back(take, like, x):
  """The transpose of a linear function: what it has taken back in its place, float32.

  Args:
    take: the function.
    like: an array that it takes from.
    x: what it gave, or the gradient of that.
  """
  whole = jax.ShapeDtypeStruct(like.shape, jnp.float32)
  return jax.linear_transpose(take, whole)(x.astype(jnp.float32))[0]


def _neighbours(plan, length):
  far = min(math.ceil((plan.window - 1) / (length // 2)), 2 * plan.size - 1)
  for distance in range(1, far + 1):
    yield _Neighbours(plan, length, distance)
    if not plan.causal:
      yield _Neighbours(plan, length, -distance)


def _stacked(x):
  return jnp.concatenate(context_parallel.halves(x))


def _own_band(plan):
  return blockwise.Band(plan.causal, plan.window)


def forward(plan, q, k, v, ids):
  met = [(m, m.keys(k), m.keys(v), m.segments(ids)) for m in _neighbours(plan, q.shape[T_AXIS])]
  q2, k2, v2, ids2 = map(_stacked, (q, k, v, ids))
  out, log_z = blockwise.forward(plan.kernel, _own_band(plan), q2, k2, v2, ids2, ids2)
  total = out.astype(jnp.float32), log_z
  for meet, *keys, of_keys in met:
    keys, total = context_parallel.in_turn(keys, total)
    part = blockwise.forward(
      plan.kernel, meet.band, meet.queries(q), *keys, meet.queries(ids), of_keys
    )
    total = blockwise.join(
      total, (meet.filled(part[0], 0), meet.filled(part[1], blockwise.NOTHING))
    )
  return tuple(jnp.concatenate(jnp.split(x, 2), T_AXIS) for x in total)


def backward(plan, q, k, v, ids, out, log_z, dout):
  met = [(m, m.keys(k), m.keys(v), m.segments(ids)) for m in _neighbours(plan, q.shape[T_AXIS])]
  q2, k2, v2, ids2, *saved = map(_stacked, (q, k, v, ids, out, log_z, dout))
  got = blockwise.backward(plan.kernel, _own_band(plan), q2, k2, v2, ids2, ids2, *saved)
  grads = [_put_back(_stacked, x, d) for x, d in zip((q, k, v), got)]
  for meet, *keys, of_keys in met:
    saved = map(meet.queries, (out, log_z, dout))
    got = blockwise.backward(
      plan.kernel, meet.band, meet.queries(q), *keys, meet.queries(ids), of_keys, *saved
    )
    takes = (meet.queries, meet.keys, meet.keys)
    for i, (take, x, d) in enumerate(zip(takes, (q, k, v), got)):
      grads[i] += _put_back(take, x, d)
  return grads
