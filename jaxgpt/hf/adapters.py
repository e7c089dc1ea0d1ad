"""Low-rank adapters as PEFT publishes them: a pair of matrices for each adapted module."""

import numpy as np

from jaxgpt import tree
from jaxgpt.errors import UserError
from jaxgpt.model import lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def publish(published, params, c_model):
  """The adapters of a model under the names of the modules that they belong to.

  Where a module holds several of our weights side by side (GPT-2's c_attn), its two matrices hold
  theirs as blocks, with the ranks added up.

  Args:
    published: from `convert.publish`, of the model without adapters.
    params: all parameters, with the adapters.
    c_model: the config's `model` section.

  Returns:
    (tensors, config): {name: float32 array}, and the fields of adapter_config.json that the
    adapters decide.

  Raises:
    UserError: adapters that PEFT has no form for.
  """
  if c_model.latent.kv_rank:
    raise UserError(
      "model.latent.kv_rank > 0: adapters of latent attention have no published form; "
      "export the merged model, without --adapter"
    )
  adapters = {
    path: [np.asarray(x) for x in pair]
    for path, pair in lora.adapters(tree.flatten(params)).items()
  }
  tensors, ranks, inputs_first = {}, {}, False
  for p in published:
    if not any(piece.path in adapters for piece in p.pieces):
      continue
    module = p.name.removesuffix(".weight")
    a, b = _blocks(p, adapters)
    tensors[f"base_model.model.{module}.lora_A.weight"] = a
    tensors[f"base_model.model.{module}.lora_B.weight"] = b
    ranks[module] = len(a)
    inputs_first |= p.pieces[0].layout.starts_alike
  rank = c_model.lora.rank
  scale = c_model.lora.alpha / rank
  other = {module: r for module, r in ranks.items() if r != rank}
  return tensors, {
    "r": rank,
    "lora_alpha": c_model.lora.alpha,
    "lora_dropout": c_model.lora.dropout,
    "target_modules": sorted({".".join(module.split(".")[-2:]) for module in ranks}),
    "rank_pattern": other,
    "alpha_pattern": {module: r * scale for module, r in other.items()},
    "fan_in_fan_out": inputs_first,
  }


def _blocks(p, adapters):
  """(A [rank, in], B [out, rank]) of a published tensor; zeros where a part has no adapter."""
  there = [piece.path in adapters for piece in p.pieces]
  lead = p.pieces[0].lead
  parts = []
  for piece, has in zip(p.pieces, there, strict=True):
    if has:
      a, b = (x[lead] for x in adapters[piece.path])
      parts.append((a.reshape(-1, a.shape[-1]).T, b.reshape(b.shape[0], -1).T))
    else:
      parts.append((None, np.zeros((piece.layout.their_shape[p.axis], 0), np.float32)))
  a = np.concatenate([part for part, _ in parts if part is not None])
  b = np.zeros((sum(len(part) for _, part in parts), len(a)), np.float32)
  row = column = 0
  for _, part in parts:
    b[row : row + len(part), column : column + part.shape[1]] = part
    row, column = row + len(part), column + part.shape[1]
  return np.ascontiguousarray(a), b
