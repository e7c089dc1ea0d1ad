"""Quantized weights in a checkpoint: codes of 8 or 4 bits and scales, in the place of a weight.

  layers/attn/q/codes    int8 [M, I, O], or uint8 [M, (I + 1) // 2, O] with two codes of 4 bits each
  layers/attn/q/scales   float32 [M, G, O], one for each of G groups of inputs of an output

A weight is code * scale. Checkpoints hold only codes and scales. A run that is loaded gets float32
weights, so everything that works with a run works with a quantized one, at the same speed and in
the same memory.

M matrices, I inputs, O outputs, G groups of inputs.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt import tree
from jaxgpt.errors import UserError
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.run import run_folder
from jaxgpt.run.compression import record as record_lib
from jaxgpt.run.compression.matrix import Matrix
from jaxgpt.tree import PyTree

_KEY = "quantized"  # of the record
CODES, SCALES = "codes", "scales"


class Form(NamedTuple):
  """How one parameter is stored.

  Attributes:
    matrix: The parameter as matrices.
    bits: 8 or 4.
    groups: G.
  """

  matrix: Matrix
  bits: int
  groups: int

  def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape, dtype)} of the stored arrays."""
    m = self.matrix
    rows = m.inputs if self.bits == 8 else (m.inputs + 1) // 2
    return {
      CODES: ((m.num_matrices, rows, m.outputs), "int8" if self.bits == 8 else "uint8"),
      SCALES: ((m.num_matrices, self.groups, m.outputs), "float32"),
    }

  def store(self, codes_MIO: np.ndarray, scales_MGO: np.ndarray) -> dict[str, np.ndarray]:
    """The stored arrays of integer codes and their scales."""
    codes = codes_MIO.astype(np.int8)
    if self.bits == 4:
      if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1), (0, 0)))
      codes = (codes[:, ::2] & 15).astype(np.uint8) | (codes[:, 1::2].astype(np.uint8) << 4)
    return {CODES: codes, SCALES: scales_MGO.astype(np.float32)}

  def signed(self, codes: jax.Array) -> jax.Array:
    """The int8 codes [M, I, O] of the stored array."""
    m = self.matrix
    if self.bits == 8:
      return codes
    pairs = jnp.stack([codes << 4, codes & 0xF0], 2)  # the code in the upper half of a byte
    signed = jax.lax.bitcast_convert_type(pairs, jnp.int8) >> 4
    return signed.reshape(m.num_matrices, -1, m.outputs)[:, : m.inputs]

  def weight(self, codes: jax.Array, scales_MGO: jax.Array) -> jax.Array:
    """The float32 weight of stored arrays."""
    m = self.matrix
    codes = self.signed(codes)
    groups = codes.reshape(m.num_matrices, self.groups, -1, m.outputs).astype(jnp.float32)
    return m.restored(
      (groups * scales_MGO[:, :, None]).reshape(m.num_matrices, m.inputs, m.outputs)
    )


Forms = Mapping[str, Form]


class Codes(NamedTuple):
  """A quantized parameter on the host.

  Attributes:
    form: How it is stored.
    codes_MIO: int8 codes.
    scales_MGO: float32 scales.
  """

  form: Form
  codes_MIO: np.ndarray
  scales_MGO: np.ndarray

  def codes(self) -> np.ndarray:
    """The codes in the parameter's shape."""
    return self.form.matrix.restored(self.codes_MIO)

  def scales(self) -> np.ndarray:
    """The scale of each weight, in the parameter's shape."""
    size = self.form.matrix.inputs // self.form.groups
    return self.form.matrix.restored(np.repeat(self.scales_MGO, size, axis=1))

  def weight(self, scales_MGO: np.ndarray) -> np.ndarray:
    """The float32 weight with other scales, in the parameter's shape."""
    size = self.form.matrix.inputs // self.form.groups
    scales_MIO = np.repeat(scales_MGO.astype(np.float32), size, axis=1)
    return self.form.matrix.restored(self.codes_MIO.astype(np.float32) * scales_MIO)


def to_record(forms: Forms) -> dict[str, Any]:
  """The entry of the record that `of_run` reads."""
  one = lambda f: {**f.matrix._asdict(), "bits": f.bits, "groups": f.groups}
  return {_KEY: {path: one(form) for path, form in forms.items()}}


def of_run(folder: epath.PathLike) -> dict[str, Form]:
  """The quantized parameters of a run by path, {} if it has none.

  Raises:
    UserError: The record is broken.
  """
  found = (record_lib.read(folder) or {}).get(_KEY, {})
  try:
    return {
      path: Form(
        Matrix(path, tuple(f["shape"]), tuple(f["ins"]), tuple(f["outs"])), f["bits"], f["groups"]
      )
      for path, f in found.items()
    }
  except (KeyError, TypeError) as e:
    raise UserError(
      f"{epath.Path(folder) / record_lib.FILE} is broken ({type(e).__name__}: {e}); make the run "
      "again"
    ) from e


def read(folder: epath.PathLike, abstract: PyTree, step: int | None = None) -> dict[str, Codes]:
  """Reads the codes of a run to the host.

  Args:
    folder: The run folder.
    abstract: Weights of the run, or their shapes and shardings.
    step: Step of the checkpoint. None: the newest.

  Returns:
    {path: codes}, {} for a run that is not quantized.

  Raises:
    UserError: There is no such checkpoint.
  """
  forms = of_run(folder)
  if not forms:
    return {}
  where = epath.Path(folder) / run_folder.CHECKPOINTS
  checkpoints = checkpoints_lib.Checkpoints(where, read_only=True)
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  stored = stored_like(forms, jax.tree.map(like, abstract))
  state, _ = checkpoints.restore({"params": stored}, step)
  checkpoints.close()
  named = tree.flatten(state["params"])
  return {
    path: Codes(
      form,
      np.asarray(form.signed(named[f"{path}/{CODES}"])),
      np.asarray(named[f"{path}/{SCALES}"]),
    )
    for path, form in forms.items()
  }


def stored_like(forms: Forms, abstract: PyTree) -> PyTree:
  """Shapes of the stored arrays.

  Args:
    forms: From `of_run`.
    abstract: Shapes and shardings of the weights.
  """
  named = tree.flatten(abstract)
  out: dict[str, Any] = {}
  for path, leaf in named.items():
    if path not in forms:
      out[path] = leaf
      continue
    for name, (shape, dtype) in forms[path].shapes().items():
      out[f"{path}/{name}"] = jax.ShapeDtypeStruct(shape, dtype, sharding=whole(leaf.sharding))
  return tree.unflatten(out)


def whole(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
  """A copy on each device: the dimensions of codes are not those of the weight."""
  if isinstance(sharding, NamedSharding):
    return NamedSharding(sharding.mesh, PartitionSpec())
  return sharding


def dequantized(forms: Forms, stored: PyTree, abstract: PyTree) -> PyTree:
  """The weights of stored arrays, with the shardings of `abstract`."""
  named, out = tree.flatten(stored), dict[str, Any]()
  for path, leaf in tree.flatten(abstract).items():
    if path in forms:
      make = jax.jit(forms[path].weight, out_shardings=leaf.sharding)
      out[path] = make(named[f"{path}/{CODES}"], named[f"{path}/{SCALES}"])
    else:
      out[path] = named[path]
  return tree.unflatten(out)


def shapes(forms: Forms, stored: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
  """{path: shape} of the weights, from those of the stored arrays."""
  parts = {f"{path}/{name}" for path in forms for name in (CODES, SCALES)}
  plain = {path: shape for path, shape in stored.items() if path not in parts}
  return plain | {path: form.matrix.shape for path, form in forms.items()}
