"""Rotary position embedding, and the scalings that stretch it to longer contexts.

B batch, T position, N heads, H head size, R rotated part of a head.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

Scaled = tuple[np.ndarray, float]  # (inverse frequencies [R/2], factor on sines and cosines)


def angles(
  positions_BT: jax.Array,
  rotated: int,
  c_rope: ml_collections.FrozenConfigDict,
  theta: float,
  scaling: str,
  context: int,
) -> tuple[jax.Array, jax.Array]:
  """Computes sines and cosines of the rotary embedding (arXiv:2104.09864, eq. 15).

  Args:
    positions_BT: Integer positions.
    rotated: R, the number of rotated entries of a head. It is even.
    c_rope: The config's `model.rope` section.
    theta: Base of the frequencies.
    scaling: A key of `SCALINGS`.
    context: Longest context of this call in tokens. 'ntk' and 'longrope' depend on it.

  Returns:
    (sin, cos), each [B, T, 1, R/2] in float32, multiplied by the attention factor of the scaling.
  """
  inverse, factor = SCALINGS[scaling](theta, rotated, c_rope, context)
  angle = positions_BT[..., None, None].astype(jnp.float32) * jnp.asarray(inverse, jnp.float32)
  return jnp.sin(angle) * factor, jnp.cos(angle) * factor


def rotate(
  x_BTNH: jax.Array, sin: jax.Array, cos: jax.Array, *, by_matmul: bool = False
) -> jax.Array:
  """Rotates the first R entries of each head. Entry i is paired with entry i + R/2, as in Llama.

  Args:
    x_BTNH: Queries or keys.
    sin: From `angles`.
    cos: From `angles`.
    by_matmul: Whether to swap the halves of a head by a matmul with a permutation, if R = H and x
      is bfloat16. The values are the same. It is faster on TPUs, whose vector units would work on
      half-filled lanes.

  Returns:
    [B, T, N, H] in x's dtype.
  """
  half = sin.shape[-1]
  if by_matmul and x_BTNH.shape[-1] == 2 * half and x_BTNH.dtype == jnp.bfloat16:
    return _rotated_whole(x_BTNH, sin, cos)
  a, b = (x_BTNH[..., i : i + half].astype(jnp.float32) for i in (0, half))
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTNH.dtype)
  return jnp.concatenate([rotated, x_BTNH[..., 2 * half :]], -1)


@jax.custom_vjp
def _rotated_whole(x_BTNH: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  half = sin.shape[-1]
  swap = np.roll(np.eye(2 * half), half, axis=1)  # a permutation, so products are exact
  swapped = jnp.einsum("...H,HG->...G", x_BTNH, jnp.asarray(swap, x_BTNH.dtype))
  twice = lambda a, b: jnp.concatenate([a, b], -1)
  y = x_BTNH.astype(jnp.float32) * twice(cos, cos)
  return (y + swapped.astype(jnp.float32) * twice(-sin, sin)).astype(x_BTNH.dtype)


# The gradient is the inverse rotation. The derived one would round the halves before adding them.
_rotated_whole.defvjp(
  lambda x, sin, cos: (_rotated_whole(x, sin, cos), (sin, cos)),
  lambda saved, dy: (_rotated_whole(dy, -saved[0], saved[1]), None, None),
)


def _plain(
  theta: float, rotated: int, c_rope: ml_collections.FrozenConfigDict, context: int
) -> Scaled:
  """The original frequencies."""
  del c_rope, context
  return 1 / theta ** (np.arange(0, rotated, 2) / rotated), 1.0


def _linear(
  theta: float, rotated: int, c_rope: ml_collections.FrozenConfigDict, context: int
) -> Scaled:
  """Position interpolation: positions divided by the factor (arXiv:2306.15595)."""
  inverse, _ = _plain(theta, rotated, c_rope, context)
  return inverse / c_rope.factor, 1.0


def _ntk(
  theta: float, rotated: int, c_rope: ml_collections.FrozenConfigDict, context: int
) -> Scaled:
  """Dynamic NTK: the base grows once the context exceeds the original one (HF's 'dynamic')."""
  grown = max(context / c_rope.original_len, 1.0)
  theta *= (c_rope.factor * grown - (c_rope.factor - 1)) ** (rotated / (rotated - 2))
  return _plain(theta, rotated, c_rope, context)


def _llama3(
  theta: float, rotated: int, c_rope: ml_collections.FrozenConfigDict, context: int
) -> Scaled:
  """Divides long wavelengths by the factor, keeps short ones, with a ramp (arXiv:2407.21783)."""
  inverse, _ = _plain(theta, rotated, c_rope, context)
  # Turns of each frequency within the original context.
  turns = c_rope.original_len * inverse / (2 * math.pi)
  keep = np.clip((turns - c_rope.low_freq) / (c_rope.high_freq - c_rope.low_freq), 0, 1)
  return inverse * (keep + (1 - keep) / c_rope.factor), 1.0


def _yarn(
  theta: float, rotated: int, c_rope: ml_collections.FrozenConfigDict, context: int
) -> Scaled:
  """YaRN: a ramp over the frequencies' turns, and an attention factor (arXiv:2309.00071)."""
  inverse, _ = _plain(theta, rotated, c_rope, context)

  def index_of(turns: float) -> float:
    """Index of the frequency that makes this many turns within the original context."""
    return rotated * math.log(c_rope.original_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

  low = max(math.floor(index_of(c_rope.beta_fast)), 0)
  high = min(math.ceil(index_of(c_rope.beta_slow)), rotated - 1)
  ramp = np.clip((np.arange(rotated // 2) - low) / max(high - low, 1e-3), 0, 1)
  factor = c_rope.attention_factor
  if factor is None:
    factor = 0.1 * math.log(c_rope.factor) + 1 if c_rope.factor > 1 else 1.0
  return inverse * (1 - ramp + ramp / c_rope.factor), factor


def _longrope(
  theta: float, rotated: int, c_rope: ml_collections.FrozenConfigDict, context: int
) -> Scaled:
  """LongRoPE: a searched factor per frequency, from one of two sets (arXiv:2402.13753)."""
  inverse, _ = _plain(theta, rotated, c_rope, context)
  is_long = context > c_rope.original_len
  factor = c_rope.attention_factor
  if factor is None:
    grown = max(c_rope.factor, 1.0)
    factor = math.sqrt(1 + math.log(grown) / math.log(c_rope.original_len))
  return inverse / np.asarray(c_rope.long_factors if is_long else c_rope.short_factors), factor


# Values of `model.rope.scaling`.
SCALINGS: dict[str, Callable[[float, int, ml_collections.FrozenConfigDict, int], Scaled]] = {
  "none": _plain,
  "linear": _linear,
  "ntk": _ntk,
  "llama3": _llama3,
  "yarn": _yarn,
  "longrope": _longrope,
}
