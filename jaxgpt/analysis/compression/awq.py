"""Activation-aware weight quantization (AWQ, arXiv:2306.00978).

Inputs of a matrix with large activations matter most. Their weights are scaled up before they are
rounded, and the activations are scaled down by as much, so that the model computes the same and the
rounding of these weights costs less:

  scale      s_i = m_i^a / sqrt(max m^a * min m^a)      m_i mean |x_i| over the calibration tokens
  error      sum over the matrices W that read x of ||x/s Q(s W) - x W||^2, Q rounds to nearest
  exponent   a, that with the smallest error of 0, 0.05, ..., 0.95; 0 is rounding to nearest

The activations are scaled by the operation that writes them, so that nothing is added to the model:

  attn_norm -> attn/q, attn/k, attn/v     mlp_norm -> mlp/gate, mlp/up     the norm's scale and bias
  attn/v    -> attn/o                     its outputs; query heads of one key/value head share s
  mlp/up    -> mlp/down                   its outputs, of a gated MLP or one with a ReLU

Where nothing can scale them (a GELU in between, a norm after the branch, latent attention, experts)
matrices are rounded to nearest without a scale.

I inputs, O outputs of a matrix, K key/value heads, N heads, H head size.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxgpt.analysis.compression import calibration, rounding
from jaxgpt.run.compression.quantized_weights import Form

EXPONENTS = np.arange(20) / 20
_LEAST = 1e-4  # magnitude of an input, so that one that is never used gets a finite scale
_DEGREES = {"relu": 1, "relu2": 2}  # activations with f(x / s) = f(x) / s^degree


class Link(NamedTuple):
  """Activations, the arrays that write them and the matrices that read them.

  Attributes:
    writers: Paths of arrays, whose last dimensions are those of the activations.
    readers: Paths of matrices, whose first dimensions are those of the activations.
    shape: Shape of the scale: [I], or [K, H] for the outputs of attention heads.
    repeats: Query heads that read the same [H] of the writers. 1 elsewhere.
    degree: The activations are divided by s^degree where the writers are divided by s.
  """

  writers: tuple[str, ...]
  readers: tuple[str, ...]
  shape: tuple[int, ...]
  repeats: int = 1
  degree: int = 1


class Best(NamedTuple):
  """The result of `search`: the scale in the link's shape, and its exponent."""

  scale: np.ndarray
  exponent: float


def links(cfg: ml_collections.ConfigDict, params: Mapping[str, Any]) -> list[Link]:
  """The activations of a period that can be scaled.

  Args:
    cfg: The resolved `model` section.
    params: {path within the period: array}.
  """
  found = []
  blocks = sorted({path.split("attn/")[0] for path in params if "attn/o" in path})
  normed = cfg.norm_placement in ("pre", "both") and cfg.first_norm
  for block in blocks:
    there = lambda *names, block=block: tuple(block + x for x in names if block + x in params)
    size = lambda path: np.shape(params[path])
    if not cfg.latent.kv_rank:
      if normed:
        norm = there("attn_norm/scale", "attn_norm/bias")
        found.append(Link(norm, there("attn/q", "attn/k", "attn/v"), size(norm[0])))
      v = there("attn/v", "attn/v_bias")
      repeats = cfg.num_heads // cfg.num_kv_heads
      found.append(Link(v, there("attn/o"), size(v[0])[1:], repeats))
    if there("mlp/router") or not there("mlp/up"):
      continue
    if cfg.norm_placement in ("pre", "both"):
      norm = there("mlp_norm/scale", "mlp_norm/bias")
      found.append(Link(norm, there("mlp/gate", "mlp/up"), size(norm[0])))
    degree = 1 if cfg.gated else _DEGREES.get(cfg.activation, 0)
    if degree:
      up = there("mlp/up", "mlp/up_bias")
      found.append(Link(up, there("mlp/down"), size(up[0])[1:], degree=degree))
  return found


def _per_input(link: Link, scale: Any) -> Any:
  """[I] of a scale in the link's shape, for NumPy or JAX."""
  return scale.repeat(link.repeats, 0).reshape(-1)


def folded(
  link: Link, params: Mapping[str, np.ndarray], scale: np.ndarray
) -> dict[str, np.ndarray]:
  """The arrays of a link with its activations divided by a scale: the model computes the same.

  Args:
    link: From `links`.
    params: As there.
    scale: In the link's shape.
  """
  of_inputs = scale.repeat(link.repeats, 0)
  out = {path: params[path] / scale ** (1 / link.degree) for path in link.writers}
  for path in link.readers:
    w = params[path]
    out[path] = w * of_inputs.reshape(*of_inputs.shape, *[1] * (w.ndim - of_inputs.ndim))
  return out


def search(
  link: Link,
  params: Mapping[str, np.ndarray],
  forms: Mapping[str, Form],
  seen: calibration.Seen,
) -> Best:
  """Finds the scale with the smallest error on the calibration text.

  Args:
    link: From `links`.
    params: As there.
    forms: {path within the period: form} of the matrices that are quantized.
    seen: The period and its inputs.
  """
  readers = [path for path in link.readers if path in forms]
  magnitude_I = seen.magnitudes[readers[0]]
  grouped = magnitude_I.reshape(link.shape[0], link.repeats, -1).mean(1).reshape(link.shape)
  scales = np.stack([scale_of(grouped, a) for a in EXPONENTS]).astype(np.float32)
  scales_AI = np.stack([_per_input(link, scale) for scale in scales])
  errors_A = sum(
    np.asarray(
      errors(
        jnp.asarray(params[path].reshape(scales_AI.shape[1], -1)),
        jnp.asarray(seen.inputs[path]),
        jnp.asarray(scales_AI),
        forms[path].bits,
        forms[path].groups,
      )
    )
    for path in readers
  )
  best = int(np.argmin(errors_A))
  return Best(scales[best], float(EXPONENTS[best]))


def scale_of(magnitude: np.ndarray, exponent: float) -> np.ndarray:
  """The scale of activations with some mean magnitudes, of any shape."""
  powers = np.maximum(magnitude, _LEAST) ** exponent
  return powers / np.sqrt(powers.max() * powers.min())


@functools.partial(jax.jit, static_argnames=("bits", "groups"))
def errors(
  weight_IO: jax.Array, products_II: jax.Array, scales_AI: jax.Array, bits: int, groups: int
) -> jax.Array:
  """The squared error of a matrix's outputs, summed over tokens, for each scale of its inputs.

  Args:
    weight_IO: The matrix.
    products_II: Products of pairs of inputs, summed over calibration tokens.
    scales_AI: The scales.
    bits: Bits of a code.
    groups: Groups of inputs that share a rounding scale.
  """

  def one(scale_I: jax.Array) -> jax.Array:
    split = (weight_IO * scale_I[:, None]).reshape(groups, -1, weight_IO.shape[1])
    step = rounding.scale_of(split, 1, bits)[:, None]
    rounded = (rounding.codes_of(split, step, bits) * step).reshape(weight_IO.shape)
    off_IO = rounded / scale_I[:, None] - weight_IO
    return (off_IO * (products_II @ off_IO)).sum()

  return jax.lax.map(one, scales_AI)
