"""Quantization after training: to nearest, GPTQ (arXiv:2210.17323), AWQ (arXiv:2306.00978).

M matrices, I inputs, O outputs of a matrix, G groups of inputs of an output.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgpt import tree
from jaxgpt.analysis.compression import awq, calibration, column_sweep, matrices, rounding
from jaxgpt.analysis.compression.methods import UnsuitableError
from jaxgpt.analysis.compression.rounding import Codes
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
    exponents: {matrices that read the same activations: the exponent of their scales in each
      layer}, of AWQ.
  """

  stored: PyTree
  forms: dict[str, Form]
  exponents: dict[str, list[float]]


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
  codes = rounding.codes_of(split, swept.prepared[:, None], bits)
  return Codes(np.asarray(codes).reshape(weight_IO.shape), np.asarray(swept.prepared))


@functools.lru_cache(maxsize=4)
def _scales_of(bits: int) -> column_sweep.Prepare:
  return lambda group_GO, diagonal_G: rounding.scale_of(group_GO, 0, bits)


@functools.lru_cache(maxsize=4)
def _rounded_to(bits: int) -> column_sweep.Replace:
  return lambda weight_O, scale_O, index: rounding.codes_of(weight_O, scale_O, bits) * scale_O


def quantize(run: load.Run, settings: Settings, batches: Sequence[PyTree] = ()) -> Quantized:
  """Quantizes a model.

  Args:
    run: From `compressed_run.opened`.
    settings: What to quantize and how.
    batches: Calibration text from `calibration.rows`, for GPTQ and AWQ.

  Raises:
    UserError: A pattern matches no parameter, or the settings do not suit one.
  """
  _, axes = transformer.abstract(run.parts.model)
  of_model = matrices.of(axes, run.params)
  paths = matrices.chosen(axes, run.params, settings.match)
  forms = {path: _form(path, of_model, settings) for path in paths}
  found: dict[str, list[Codes]] = {path: [] for path in paths}
  exponents: dict[str, list[float]] = {}
  named = calibration.flat(run.params)
  if settings.method == "gptq":
    _by_gptq(run, settings, forms, found, batches)
  elif settings.method == "awq":
    named = calibration.flat(_by_awq(run, forms, found, exponents, batches))
  if settings.method == "nearest":
    for path, form in forms.items():
      view_MIO = form.matrix.view(named[path])
      found[path] = [rounding.nearest(w_IO, settings.bits, form.groups) for w_IO in view_MIO]
  if settings.outside:
    for path, matrix in matrices.outside(axes, run.params).items():
      forms[path] = Form(matrix, settings.outside, 1)
      found[path] = [
        rounding.nearest(w_IO, settings.outside, 1) for w_IO in matrix.view(named[path])
      ]
  for path, form in forms.items():
    del named[path]
    codes_MIO, scales_MGO = (np.stack(part) for part in zip(*found[path], strict=True))
    arrays = form.store(codes_MIO, scales_MGO)
    named |= {f"{path}/{name}": array for name, array in arrays.items()}
  return Quantized(tree.unflatten(named), forms, exponents)


def _form(path: str, of_model: Mapping[str, Matrix], settings: Settings) -> Form:
  """How a parameter that the user chose is stored."""
  if path not in of_model:
    raise UserError(
      f"--match: {path} is no matrix of a layer; leave it out (embeddings and head: --embeddings)"
    )
  matrix = of_model[path]
  group = settings.group or matrix.inputs
  if matrix.inputs % group:
    raise UnsuitableError(
      f"--group={group}",
      f"{path} has {matrix.inputs} inputs, which {group} does not divide",
      "choose another group, or leave --group out",
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
        raise UnsuitableError(
          "--method=gptq",
          f"{zeros:.0%} of {path} are zero, and GPTQ would fill them in",
          "use --method=nearest for a pruned run",
        )
      products_II = calibration.require(seen, name, settings.method, "nearest")
      matrix = forms[path].matrix._replace(shape=(1, *w.shape))
      codes = gptq(matrix.view(w[None])[0], products_II, settings.bits, forms[path].groups)
      found[path].append(codes)
      params[name] = matrix.restored(codes.weight()[None])[0]
    return tree.unflatten(params)

  calibration.walk(run, batches, visit, products=True)


def _by_awq(
  run: load.Run,
  forms: Mapping[str, Form],
  found: dict[str, list[Codes]],
  exponents: dict[str, list[float]],
  batches: Sequence[PyTree],
) -> PyTree:
  """Scales and rounds layer by layer. Adds to `found` and `exponents`, returns all parameters."""

  def visit(seen: calibration.Seen) -> PyTree:
    params = calibration.flat(seen.params)
    here = {
      name: forms[f"{seen.stack}/{name}"] for name in params if f"{seen.stack}/{name}" in forms
    }
    for link in awq.links(run.c.model, params):
      if set(link.readers) & here.keys():
        best = awq.search(link, params, here, seen)
        params |= awq.folded(link, params, best.scale)
        names = ",".join(f"{seen.stack}/{name}" for name in link.readers)
        exponents.setdefault(names, []).append(best.exponent)
    for name, form in here.items():
      w = params[name]
      matrix = form.matrix._replace(shape=(1, *w.shape))
      codes = [rounding.nearest(x, form.bits, form.groups) for x in matrix.view(w[None])]
      found[f"{seen.stack}/{name}"] += codes
      params[name] = matrix.restored(np.stack([c.weight() for c in codes]))[0]
    return tree.unflatten(params)

  return calibration.walk(run, batches, visit, products=True)
