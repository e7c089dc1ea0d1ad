"""Quantization after training: to nearest, and GPTQ (arXiv:2210.17323).

The codes are symmetric: a weight is code * scale, and a scale is the largest magnitude of its group
over 2^(bits - 1) - 0.5, so that the outermost codes are used fully.

M matrices, I inputs, O outputs of a matrix, G groups of inputs of an output.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import tree
from jaxgpt.analysis.compression import calibration, column_sweep, matrices
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.model import transformer
from jaxgpt.run.compression.matrix import Matrix
from jaxgpt.run.compression.quantized_weights import Form
from jaxgpt.tree import PyTree

_MANY_ZEROS = 0.2  # share of zeros of a pruned matrix


class Settings(NamedTuple):
  """What to quantize and how.

  Attributes:
    method: One of `methods.ROUNDING`.
    bits: 8 or 4.
    group: Inputs that share a scale. 0: all inputs of an output.
    match: Patterns of parameters. (): the matrices of the layers.
    outside: Bits of embeddings and head, rounded to nearest with a scale per token. 0: they stay.
  """

  method: str
  bits: int
  group: int = 0
  match: tuple[str, ...] = ()
  outside: int = 0


class Quantized(NamedTuple):
  """The result of `quantize`.

  Attributes:
    stored: The arrays to store, see `quantized_weights`.
    forms: How each quantized parameter is stored.
  """

  stored: PyTree
  forms: dict[str, Form]


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


def gptq(weight_IO: np.ndarray, products_II: np.ndarray, bits: int, groups: int) -> Codes:
  """Rounds input after input, and lets the inputs that follow make up for the error.

  Args:
    weight_IO: The matrix.
    products_II: Products of pairs of inputs, summed over calibration tokens.
    bits: Bits of a code.
    groups: G.
  """
  inputs = len(weight_IO)
  group = inputs // groups
  block = column_sweep.block_of(inputs, 1 if groups == 1 else group)
  swept = column_sweep.sweep(
    jnp.asarray(weight_IO),
    jnp.asarray(products_II),
    group=group,
    block=block,
    prepare=_scales_of(bits),
    replace=_rounded_to(bits),
  )
  split = swept.weight_IO.reshape(groups, group, -1)
  codes = codes_of(split, swept.prepared[:, None], bits)
  return Codes(np.asarray(codes).reshape(weight_IO.shape), np.asarray(swept.prepared))


@functools.lru_cache(maxsize=4)
def _scales_of(bits: int) -> column_sweep.Prepare:
  return lambda group_GO, diagonal_G: scale_of(group_GO, 0, bits)


@functools.lru_cache(maxsize=4)
def _rounded_to(bits: int) -> column_sweep.Replace:
  return lambda weight_O, scale_O, index: codes_of(weight_O, scale_O, bits) * scale_O


def quantize(run: load.Run, settings: Settings, batches: Sequence[PyTree] = ()) -> Quantized:
  """Quantizes a model.

  Args:
    run: From `compressed_run.opened`.
    settings: What to quantize and how.
    batches: Calibration text from `calibration.rows`, for GPTQ.

  Raises:
    UserError: A pattern matches no parameter, or the settings do not suit one.
  """
  _, axes = transformer.abstract(run.parts.model)
  of_model = matrices.of(axes, run.params)
  paths = matrices.chosen(axes, run.params, settings.match)
  forms = {path: _form(path, of_model, settings) for path in paths}
  found: dict[str, list[Codes]] = {path: [] for path in paths}
  if settings.method == "gptq":
    _by_gptq(run, settings, forms, found, batches)
  named = calibration.flat(run.params)
  if settings.method == "nearest":
    for path, form in forms.items():
      view_MIO = form.matrix.view(named[path])
      found[path] = [nearest(w_IO, settings.bits, form.groups) for w_IO in view_MIO]
  if settings.outside:
    for path, matrix in matrices.outside(axes, run.params).items():
      forms[path] = Form(matrix, settings.outside, 1)
      found[path] = [nearest(w_IO, settings.outside, 1) for w_IO in matrix.view(named[path])]
  for path, form in forms.items():
    del named[path]
    codes_MIO, scales_MGO = (np.stack(part) for part in zip(*found[path], strict=True))
    arrays = form.store(codes_MIO, scales_MGO)
    named |= {f"{path}/{name}": array for name, array in arrays.items()}
  return Quantized(tree.unflatten(named), forms)


def _form(path: str, of_model: Mapping[str, Matrix], settings: Settings) -> Form:
  """How a parameter that the user chose is stored."""
  if path not in of_model:
    raise UserError(
      f"--match: {path} is no matrix of a layer; leave it out (embeddings and head: --embeddings)"
    )
  matrix = of_model[path]
  group = settings.group or matrix.inputs
  if matrix.inputs % group:
    raise UserError(
      f"--group={group}: {path} has {matrix.inputs} inputs, which {group} does not divide; choose "
      "another group, or leave --group out"
    )
  return Form(matrix, settings.bits, matrix.inputs // group)


def _by_gptq(
  run: load.Run,
  settings: Settings,
  forms: Mapping[str, Form],
  found: dict[str, list[Codes]],
  batches: Sequence[PyTree],
) -> None:
  """Quantizes layer by layer, and adds the codes of each to `found`."""

  def visit(seen: calibration.Seen) -> PyTree:
    params = calibration.flat(seen.params)
    for name, w in params.items():
      path = f"{seen.stack}/{name}"
      if path not in forms:
        continue
      if (zeros := float((w == 0).mean())) > _MANY_ZEROS:
        raise UserError(
          f"--method=gptq: {zeros:.0%} of {path} are zero, and GPTQ would fill them in; use "
          "--method=nearest for a pruned run"
        )
      products_II = calibration.require(seen, name, settings.method, "nearest")
      matrix = forms[path].matrix._replace(shape=(1, *w.shape))
      codes = gptq(matrix.view(w[None])[0], products_II, settings.bits, forms[path].groups)
      found[path].append(codes)
      params[name] = matrix.restored(codes.weight()[None])[0]
    return tree.unflatten(params)

  calibration.walk(run, batches, visit, products=True)
