"""Attention masks: which query may attend to which key.

B batch, T query position, S key position.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30  # logit of a hidden key; finite, so that a row without any key has no NaN gradient


def visible(segment_ids_BT: jax.Array, *, causal: bool, window: int | None = None) -> jax.Array:
  """Mask of packed rows: a token attends within its own document.

  Args:
    segment_ids_BT: 1, 2, ... for the documents of a row, 0 for padding, which no token attends to.
    causal: Whether a token attends only to itself and to earlier tokens.
    window: If given, a token attends only to tokens fewer than `window` positions away.

  Returns:
    Boolean array [B, T, S], True where query t may attend to key s.
  """
  T = segment_ids_BT.shape[1]
  distance = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
  mask = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  mask &= segment_ids_BT[:, None, :] != 0
  if causal:
    mask &= distance >= 0
  return mask if window is None else mask & (jnp.abs(distance) < window)


class Band(NamedTuple):
  """The mask of one block of queries against one block of keys, by distance alone.

  With d = offset + t - s, query t attends to key s if d >= 0 (where `causal`) and |d| < `window`
  (where given):

                  keys s                          keys s
    queries t   # . . . . .        queries t    # . . . . .
                # # . . . .                     # # . . . .
                # # # . . .                     . # # . . .
                # # # # . .                     . . # # . .
          causal, offset 0               causal, window 2, offset 0

  Attributes:
    causal: Whether keys after the query are hidden.
    window: If given, keys at a distance of `window` or more are hidden.
    offset: Position of the first query minus position of the first key.
  """

  causal: bool = False
  window: int | None = None
  offset: int = 0

  def hides(self, T: int, S: int) -> bool:
    """Whether any of T queries is kept from any of S keys."""
    least, most = self.offset - S + 1, self.offset + T - 1
    return (self.causal and least < 0) or (
      self.window is not None and max(most, -least) >= self.window
    )

  def array(self, T: int, S: int) -> jax.Array:
    """The mask as a boolean array [T, S]."""
    distance = self.offset + jnp.arange(T)[:, None] - jnp.arange(S)
    mask = distance >= 0 if self.causal else jnp.ones((T, S), bool)
    return mask if self.window is None else mask & (jnp.abs(distance) < self.window)

  def blocks(self, T: int, S: int, block_q: int, block_k: int) -> np.ndarray:
    """Which blocks have a visible pair, as a boolean array [T / block_q, S / block_k]."""
    least = self.offset + np.arange(0, T, block_q)[:, None] - np.arange(block_k, S + 1, block_k) + 1
    most = least + block_q + block_k - 2  # distances of the pairs in a block
    reach = T + S + abs(self.offset) if self.window is None else self.window - 1
    return (most >= (0 if self.causal else -reach)) & (least <= reach)

  def label(self, T: int, S: int) -> str:
    """A name for T queries against S keys, which `read_label` reads.

    It is the name scope of the kernels, so it is found in the compiled program.
    """
    return f"mask_{T}x{S}_causal{self.causal:d}_window{self.window or 0}_offset{self.offset}"


_LABEL = re.compile(r"mask_(\d+)x(\d+)_causal([01])_window(\d+)_offset(-?\d+)")


def read_label(text: str) -> tuple[Band, int, int] | None:
  """The last label of a text as (band, T, S), or None without one. See `Band.label`."""
  found = _LABEL.findall(text)
  if not found:
    return None
  T, S, causal, window, offset = map(int, found[-1])
  return Band(bool(causal), window or None, offset), T, S
