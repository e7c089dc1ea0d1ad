"""Rounding of weights to the nearest codes of 8 or 4 bits.

The codes are symmetric: a weight is code * scale, and a scale is the largest magnitude of its group
over 2^(bits - 1) - 0.5, so that the outermost codes are used fully.

I inputs, O outputs of a matrix, G groups of inputs of an output.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Codes(NamedTuple):
  """A quantized matrix: integer codes [I, O] and their scales [G, O]."""

  codes_IO: np.ndarray
  scales_GO: np.ndarray

  def weight(self) -> np.ndarray:
    """The float32 weights that the codes stand for."""
    inputs, outputs = self.codes_IO.shape
    groups = self.codes_IO.reshape(len(self.scales_GO), -1, outputs).astype("float32")
    return (groups * self.scales_GO[:, None]).reshape(inputs, outputs)


def scale_of(weight: jax.Array, axis: int, bits: int) -> jax.Array:
  """The scale of each group of weights. 1 for a group of zeros.

  Args:
    weight: Weights, of which those along `axis` share a scale.
    axis: The axis, which is left out of the result.
    bits: Bits of a code.
  """
  largest = jnp.abs(weight).max(axis)
  return jnp.where(largest == 0, 1.0, largest / (2 ** (bits - 1) - 0.5))


def codes_of(weight: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
  """The nearest codes, as floats."""
  top = 2 ** (bits - 1)
  return jnp.clip(jnp.round(weight / scale), -top, top - 1)


def nearest(weight_IO: np.ndarray, bits: int, groups: int) -> Codes:
  """Rounds each weight to the nearest code.

  Args:
    weight_IO: The matrix.
    bits: Bits of a code.
    groups: G.
  """
  split = jnp.asarray(weight_IO).reshape(groups, -1, weight_IO.shape[1])
  scales_GO = scale_of(split, 1, bits)
  codes = codes_of(split, scales_GO[:, None], bits)
  return Codes(np.asarray(codes).reshape(weight_IO.shape), np.asarray(scales_GO))
