"""Attention within a window, of rows that are sharded over devices, by halo exchange.

With a window each chunk of a row needs only the end of the chunk before it (and, without a causal
mask, the start of the chunk after it). So devices do not pass whole chunks around a ring. They send
each other only these ends, the *halos*:

       chunk c-1            chunk c
    [ . . . . h h h ] -> [ q q q . . . . ]     h: the last `reach` keys of chunk c-1
                                               q: the first `reach` queries of chunk c

`reach` is window - 1, rounded up to whole kernel blocks. A window longer than a chunk also needs
the chunk at distance 2, and so on. Those in between are sent whole.

Each device holds two chunks (see `token_order`). They are stacked along the batch, so that one
kernel call computes both. Names and axes are those of `ring`.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.model.attention import blockwise
from jaxgpt.model.attention.masks import Band
from jaxgpt.model.attention.spec import Block, BlockOutput, ContextParallel
from jaxgpt.model.attention.token_order import T_AXIS, chunks, halves
from jaxgpt.parallel import chips

_Linear = Callable[[jax.Array], jax.Array]


class Reach(NamedTuple):
  """The part of another chunk that is within the window of a chunk.

  Attributes:
    distance: Chunks from the other chunk to this one, negative if it comes after this one.
    tokens: Keys of the other chunk, which as many queries of this one attend to.
    band: The mask of these queries and keys.
  """

  distance: int
  tokens: int
  band: Band


def reaches(causal: bool, window: int, size: int, count: int, block: int) -> Iterator[Reach]:
  """The parts of other chunks that the chunks of a row need.

  Args:
    causal: Whether a token attends only to earlier ones.
    window: Tokens that are visible, see `masks.Band`.
    size: Tokens of a chunk.
    count: Chunks of a row.
    block: Block size of the kernel. Whole blocks are exchanged, all with visible pairs.
  """
  block = math.gcd(size, block)
  for distance in range(1, min(math.ceil((window - 1) / size), count - 1) + 1):
    between = (distance - 1) * size  # tokens of the chunks in between
    tokens = min(-(-(window - 1 - between) // block) * block, size)
    offset = between + tokens  # from the first exchanged key to the first query
    yield Reach(distance, tokens, Band(causal, window, offset))
    if not causal:
      yield Reach(-distance, tokens, Band(causal, window, -offset))


class _Halo:
  """The exchange with the chunks at a distance from a device's own."""

  def __init__(self, cp: ContextParallel, length: int, reach: Reach):
    self._cp, self._distance, self._reach, self.band = cp, *reach
    self._chunks = chunks(cp.size, cp.spec.causal)
    self._size = length // 2

  def queries(self, x: jax.Array) -> jax.Array:
    """The queries next to the other chunk: [2B, N, reach, ...] of [B, N, T, ...]. Linear."""
    x = jnp.concatenate(halves(x))
    return x[:, :, : self._reach] if self._distance > 0 else x[:, :, -self._reach :]

  def keys(self, x: jax.Array) -> jax.Array:
    """The halo of the other chunk, zeros where the row has no such chunk. Linear.

    A device's two chunks (`here`) may need halos of either of another device's chunks (`there`), so
    there are up to four collective permutes. Each sends only between the devices that need it.
    """
    end = lambda c: c[:, :, -self._reach :] if self._distance > 0 else c[:, :, : self._reach]
    own = [end(c) for c in halves(x)]
    wanted = self._chunks - self._distance  # [n, 2]: chunk numbers that each device needs
    got = []
    for here in (0, 1):
      received = []
      for there in (0, 1):
        to, source = np.nonzero(wanted[:, here, None] == self._chunks[None, :, there])
        if len(to):
          pairs = list(zip(source.tolist(), to.tolist(), strict=True))
          received.append(jax.lax.ppermute(own[there], self._cp.axis, pairs))
      # A device that receives nothing in a permute gets zeros, so the sum picks what was sent.
      got.append(sum(received[1:], received[0]) if received else jnp.zeros_like(own[here]))
    return jnp.concatenate(got)

  def segments(self, ids: jax.Array) -> jax.Array:
    """As `keys`, for segments, with `blockwise.NO_SEGMENT` where the row has no such chunk."""
    return self.keys(ids - blockwise.NO_SEGMENT) + blockwise.NO_SEGMENT

  def pad(self, x: jax.Array, fill: float) -> jax.Array:
    """An array over `queries`, padded with `fill` to all queries of the chunks."""
    rest = self._size - self._reach
    ends = (0, rest) if self._distance > 0 else (rest, 0)
    widths = [ends if i == T_AXIS else (0, 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


def _transposed(f: _Linear, like: jax.Array, x: jax.Array) -> jax.Array:
  """Applies the transpose of a linear function, in float32.

  Args:
    f: The function.
    like: Array of the shape that `f` takes.
    x: Gradient of f's result.

  Returns:
    Gradient of f's argument.
  """
  whole = jax.ShapeDtypeStruct(like.shape, jnp.float32)
  return jax.linear_transpose(f, whole)(x.astype(jnp.float32))[0]


def _halos(cp: ContextParallel, length: int) -> Iterator[_Halo]:
  causal, window = cp.spec.causal, cp.spec.window
  assert window is not None
  block = chips.attention_block(chips.of_tracing()) if cp.kernel == "splash" else 1
  for reach in reaches(causal, window, length // 2, 2 * cp.size, block):
    yield _Halo(cp, length, reach)


def _stacked(x: jax.Array) -> jax.Array:
  """[B, N, T, ...] -> [2B, N, T/2, ...]: a device's two chunks, stacked along the batch."""
  return jnp.concatenate(halves(x))


def _exchanged(
  cp: ContextParallel, k: jax.Array, v: jax.Array, ids: jax.Array
) -> list[tuple[_Halo, jax.Array, jax.Array, jax.Array]]:
  """(halo, keys, values, segments) from each chunk within the window."""
  return [(h, h.keys(k), h.keys(v), h.segments(ids)) for h in _halos(cp, k.shape[T_AXIS])]


def forward(
  cp: ContextParallel, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array
) -> BlockOutput:
  """Attention of a device's queries, see `ring.attend`. The output is float32."""
  halos = _exchanged(cp, k, v, ids)
  q2, k2, v2, ids2 = map(_stacked, (q, k, v, ids))
  own = blockwise.forward(cp, Band(cp.spec.causal, cp.spec.window), Block(q2, k2, v2, ids2, ids2))
  total = BlockOutput(own.out.astype(jnp.float32), own.log_z)
  for halo, k_halo, v_halo, k_ids in halos:
    (k_halo, v_halo), total = blockwise.in_sequence((k_halo, v_halo), total)
    block = Block(halo.queries(q), k_halo, v_halo, halo.queries(ids), k_ids)
    found = blockwise.forward(cp, halo.band, block)
    found = BlockOutput(halo.pad(found.out, 0), halo.pad(found.log_z, blockwise.NO_LOG_Z))
    total = blockwise.merge(total, found)
  return BlockOutput(*(jnp.concatenate(jnp.split(x, 2), T_AXIS) for x in total))


def backward(
  cp: ContextParallel,
  qkv: tuple[jax.Array, jax.Array, jax.Array],
  ids: jax.Array,
  total: BlockOutput,
  dout: jax.Array,
) -> list[jax.Array]:
  """Gradients of q, k and v, float32. The gradients of halos go back by the transposed exchange."""
  q, k, v = qkv
  halos = _exchanged(cp, k, v, ids)
  q2, k2, v2, ids2, out2, log_z2, dout2 = map(_stacked, (q, k, v, ids, *total, dout))
  band = Band(cp.spec.causal, cp.spec.window)
  block = Block(q2, k2, v2, ids2, ids2)
  found = blockwise.backward(cp, band, block, BlockOutput(out2, log_z2), dout2)
  grads = [_transposed(_stacked, x, d) for x, d in zip(qkv, found, strict=True)]
  for halo, k_halo, v_halo, k_ids in halos:
    block = Block(halo.queries(q), k_halo, v_halo, halo.queries(ids), k_ids)
    out, log_z, d = map(halo.queries, (*total, dout))
    found = blockwise.backward(cp, halo.band, block, BlockOutput(out, log_z), d)
    takes = (halo.queries, halo.keys, halo.keys)
    for i, (take, x, d) in enumerate(zip(takes, qkv, found, strict=True)):
      grads[i] += _transposed(take, x, d)
  return grads
