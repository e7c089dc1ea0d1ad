"""Frozen weights as codes of 8 or 4 bits under LoRA adapters (QLoRA, arXiv:2305.14314).

With `model.lora.base` other than float32, a weight `q` of a layer is two frozen parameters:

  q_codes    int8 in the weight's shape, or uint8 with two codes of 4 bits each, of inputs that
             follow each other: half of the last input dimension
  q_scales   float32 [G, outputs...], one for each of G groups of inputs of an output

A weight is code * scale. It is formed when its layer is computed, and again in the backward pass:
the weights of all layers are never there in float32 at once. The layout within a layer is that of
`run.compression.quantized_weights`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from jaxgpt import tree
from jaxgpt.errors import UserError
from jaxgpt.tree import PyTree

CODES, SCALES = SUFFIXES = ("_codes", "_scales")
BITS = {"int8": 8, "int4": 4}


def bits_of(c_lora: Mapping[str, Any] | ml_collections.ConfigDict) -> int:
  """Bits of the codes of a model, 0 for a model whose weights are numbers."""
  return BITS.get(c_lora["base"], 0) if c_lora["rank"] else 0


def shapes(
  c_lora: ml_collections.ConfigDict, name: str, shape: Sequence[int], num_in: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Shapes of the codes and scales of a weight.

  Args:
    c_lora: The config's `model.lora` section.
    name: Name of the weight, for the message.
    shape: Its shape: input dimensions, then output dimensions.
    num_in: Number of input dimensions.

  Raises:
    UserError: The groups do not divide its inputs, or the last input dimension is odd.
  """
  ins, outs = tuple(shape[:num_in]), tuple(shape[num_in:])
  inputs = math.prod(ins)
  group = c_lora.base_group or inputs
  if inputs % group:
    raise UserError(
      f"model.lora.base_group={group}: {name} has {inputs} inputs, which {group} does not divide"
    )
  if bits_of(c_lora) == 8:
    return tuple(shape), (inputs // group, *outs)
  if ins[-1] % 2:
    raise UserError(
      f"model.lora.base='int4': the last input dimension of {name} {list(shape)} is odd; set int8"
    )
  return (*ins[:-1], ins[-1] // 2, *outs), (inputs // group, *outs)


def weight(codes: jax.Array, scales: jax.Array, num_in: int) -> jax.Array:
  """The float32 weight of codes and scales, in the weight's shape."""
  if codes.dtype == jnp.uint8:
    pairs = jnp.stack([codes << 4, codes & 0xF0], num_in)  # the code in the upper half of a byte
    codes = jax.lax.bitcast_convert_type(pairs, jnp.int8) >> 4
    size = pairs.shape[num_in - 1] * 2
    codes = codes.reshape(*pairs.shape[: num_in - 1], size, *pairs.shape[num_in + 1 :])
  outs = codes.shape[num_in:]
  groups = codes.reshape(scales.shape[0], -1, *outs).astype(jnp.float32)
  return (groups * scales[:, None]).reshape(codes.shape)


def initial(key: jax.Array, shape: Sequence[int], bits: int) -> jax.Array:
  """Random codes, for a model that starts from no run: normal, with 3 deviations on the scale."""
  top = 2 ** (bits - 1)
  codes = jnp.round(jax.random.normal(key, shape) * (top / 3))
  codes = jnp.clip(codes, -top, top - 1).astype(jnp.int8)
  if bits == 8:
    return codes
  other = jnp.roll(codes, 1, 0) if shape[0] > 1 else codes
  return (codes & 15).astype(jnp.uint8) | (other.astype(jnp.uint8) << 4)


def initial_scale(std: float, bits: int) -> float:
  """The scale of `initial` codes with which weights have a standard deviation."""
  return std * 3 / 2 ** (bits - 1)


def is_code(path: str) -> bool:
  """Whether the parameter at a path holds codes or scales."""
  return path.endswith(SUFFIXES)


def dtype_of(path: str, c_lora: ml_collections.ConfigDict) -> str:
  """The dtype of the parameter at a path of a model with this `model.lora` section."""
  if not path.endswith(CODES):
    return "float32"
  return "uint8" if bits_of(c_lora) == 4 else "int8"


def numbers(params: PyTree) -> PyTree:
  """All weights as numbers: codes and scales in the place of stacked weights are multiplied.

  Args:
    params: All parameters. Those without codes are returned as they are.
  """
  named = tree.flatten(params)
  out = {}
  for path, x in named.items():
    if path.endswith(SCALES):
      continue
    if path.endswith(CODES):
      scales = named[path.removesuffix(CODES) + SCALES]
      num_in = x.ndim - scales.ndim + 1  # both have a leading axis of layers, scales one of groups
      form = jax.vmap(lambda c, s, num_in=num_in: weight(c, s, num_in))
      out[path.removesuffix(CODES)] = form(x, scales)
    else:
      out[path] = x
  return tree.unflatten(out) if len(out) < len(named) else params
