"""Quantized weights in the format of `compressed-tensors`, which transformers and vLLM load.

A Linear whose weight is quantized has three tensors in place of `weight`, and config.json says in
`quantization_config` which modules those are:

    weight_packed   int32 [O, ceil(I * bits / 32)], codes + 2^(bits - 1), the first in the low bits
    weight_scale    [O, G], one for each group of inputs of an output
    weight_shape    int64 [2], O and I

Only matrices of `torch.nn.Linear` have this form. Embeddings and experts are written dequantized.

M matrices, I inputs, O outputs of a matrix, G groups of inputs of an output.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt import tree
from jaxgpt.errors import UserError
from jaxgpt.hf import convert, safetensors, weights
from jaxgpt.hf.convert import Published
from jaxgpt.hf.families import Family
from jaxgpt.run.compression.quantized_weights import Codes, Form
from jaxgpt.tree import PyTree

_WEIGHT = ".weight"
_WORD = 32  # bits of a word


class Scheme(NamedTuple):
  """How the weight of a Linear is quantized.

  Attributes:
    bits: 8 or 4.
    group: Inputs that share a scale. 0: all inputs of an output.
  """

  bits: int
  group: int


class Plan(NamedTuple):
  """Which tensors of an export are codes.

  Attributes:
    schemes: {name of a module: its scheme}.
    plain: The tensors that are written as numbers.
    packed: The tensors that are written as codes.
    dequantized: Parameters that the run stores as codes and the export as numbers.
  """

  schemes: dict[str, Scheme]
  plain: list[Published]
  packed: list[Published]
  dequantized: list[str]


def plan(family: Family, published: Sequence[Published], forms: Mapping[str, Form]) -> Plan:
  """Decides which tensors are written as codes.

  Args:
    family: The family.
    published: From `convert.publish`.
    forms: The quantized parameters of the run.

  Raises:
    UserError: There are none.
  """
  schemes: dict[str, Scheme] = {}
  plain, packed = [], []
  for p in published:
    scheme = _scheme(family, p, forms)
    if scheme is None:
      plain.append(p)
    else:
      packed.append(p)
      schemes[p.name.removesuffix(_WEIGHT)] = scheme
  if not schemes:
    raise UserError(
      f"--format=compressed-tensors: {family.model_type} stores none of the quantized matrices as "
      "a Linear; leave --format out to write dequantized weights"
    )
  there = {piece.path for p in plain for piece in p.pieces}
  return Plan(schemes, plain, packed, sorted(there & forms.keys()))


def _scheme(family: Family, p: Published, forms: Mapping[str, Form]) -> Scheme | None:
  """The scheme of a tensor, or None if it is written as numbers."""
  linear = (
    len(p.shape) == 2
    and p.name.endswith(_WEIGHT)
    and not p.copies
    and not p.pieces[0].start
    and not any(
      piece.layout.inputs_first or len(piece.lead) > 1 or piece.plus for piece in p.pieces
    )
    and (all(piece.lead for piece in p.pieces) or p.name in convert.head_names(family))
  )
  if not linear or any(piece.path not in forms for piece in p.pieces):
    return None
  found = {
    Scheme(form.bits, form.matrix.inputs // form.groups if form.groups > 1 else 0)
    for form in (forms[piece.path] for piece in p.pieces)
  }
  (first, *others) = found
  return None if others or forms[p.pieces[0].path].matrix.inputs != p.shape[1] else first


def config(family: Family, made: Plan) -> dict[str, Any]:
  """The `quantization_config` of config.json.

  Args:
    family: The family.
    made: From `plan`.
  """
  modules: dict[Scheme, list[str]] = {}
  for name, scheme in made.schemes.items():
    modules.setdefault(scheme, []).append(name)
  ordered = sorted(modules.items(), key=lambda item: -len(item[1]))
  groups = {
    # A name goes before a class, so all Linears but those of other groups are in the first one.
    f"group_{i}": {
      "targets": ["Linear"] if i == 0 else names,
      "weights": {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group or None,
        "dynamic": False,
      },
      "input_activations": None,
      "output_activations": None,
    }
    for i, (scheme, names) in enumerate(ordered)
  }
  plain = [p.name for p in made.plain if len(p.shape) == 2] + convert.head_names(family)
  names = [name.removesuffix(_WEIGHT) for name in plain if name.endswith(_WEIGHT)]
  return {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": groups,
    "ignore": list(dict.fromkeys(name for name in names if name not in made.schemes)),
    "kv_cache_scheme": None,
  }


def rounded(params: PyTree, codes: Mapping[str, Codes], dtype: str, made: Plan) -> PyTree:
  """The weights that an export stands for, in float32.

  Args:
    params: The dequantized weights of the run.
    codes: Codes of the quantized parameters.
    dtype: Dtype of the scales and of the other tensors, a key of `weights.DTYPES`.
    made: From `plan`.
  """
  packed = {piece.path for p in made.packed for piece in p.pieces}

  def one(path: str, x: jax.Array) -> jax.Array:
    if path not in packed:
      return weights.rounded(x, dtype)
    scales = codes[path].scales_MGO.astype(weights.DTYPES[dtype]).astype(np.float32)
    return jax.device_put(codes[path].weight(scales), x.sharding)

  return tree.map_named(one, params)


def save(
  folder: Any,
  made: Plan,
  params: PyTree,
  codes: Mapping[str, Codes],
  dtype: str,
  shard_bytes: int,
) -> list[str]:
  """Writes the tensors. Returns the names of the files.

  Args:
    folder: An empty folder.
    made: From `plan`.
    params: The dequantized weights of the run.
    codes: Codes of the quantized parameters.
    dtype: As in `rounded`.
    shard_bytes: Largest size of a file.
  """
  plain, array_of = weights.entries(made.plain, params, dtype)
  entries, makers = list(plain), {}
  for p in made.packed:
    module = p.name.removesuffix(_WEIGHT)
    for entry, make in _packed(p, made.schemes[module], codes, module, dtype):
      entries.append(entry)
      makers[entry.name] = make
  return safetensors.write(
    folder, entries, lambda e: makers[e.name]() if e.name in makers else array_of(e), shard_bytes
  )


def _packed(
  p: Published, scheme: Scheme, codes: Mapping[str, Codes], module: str, dtype: str
) -> list[tuple[safetensors.Entry, Any]]:
  """The three tensors of a Linear, each with the function that makes its array."""
  outputs, inputs = p.shape
  groups = inputs // scheme.group if scheme.group else 1
  words = -(-inputs * scheme.bits // _WORD)
  scale = weights.DTYPES[dtype]
  joined = lambda part: _joined(p, {x.path: part(codes[x.path]) for x in p.pieces})
  return [
    (
      safetensors.Entry(f"{module}.weight_packed", (outputs, words), np.dtype("int32")),
      lambda: pack(joined(Codes.codes), scheme.bits),
    ),
    (
      safetensors.Entry(f"{module}.weight_scale", (outputs, groups), scale),
      lambda: _grouped(joined(Codes.scales), groups).astype(scale),
    ),
    (
      safetensors.Entry(f"{module}.weight_shape", (2,), np.dtype("int64")),
      lambda: np.array(p.shape, np.int64),
    ),
  ]


def _joined(p: Published, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
  """[O, I] of a tensor whose pieces come from arrays of the parameters' shapes."""
  pieces = [weights.to_theirs(arrays[x.path], x) for x in p.pieces]
  return np.concatenate(pieces, p.axis).reshape(p.shape)


def _grouped(scales_OI: np.ndarray, groups: int) -> np.ndarray:
  """[O, G] of the scales of each weight."""
  split = scales_OI.reshape(len(scales_OI), groups, -1)
  if not (split == split[:, :, :1]).all():
    raise ValueError("inputs of a group are not neighbours in the published tensor")
  return split[:, :, 0]


def pack(codes_OI: np.ndarray, bits: int) -> np.ndarray:
  """Packs codes into words.

  Args:
    codes_OI: Signed codes.
    bits: 8 or 4.

  Returns:
    int32 array [O, ceil(I * bits / 32)].
  """
  per_word = _WORD // bits
  unsigned = (codes_OI.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint32)
  unsigned = np.pad(unsigned, ((0, 0), (0, -unsigned.shape[1] % per_word)))
  split = unsigned.reshape(len(unsigned), -1, per_word)
  shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
  return np.bitwise_or.reduce(split << shifts, axis=-1).view(np.int32)
