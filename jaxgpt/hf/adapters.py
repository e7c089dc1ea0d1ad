"""Low-rank adapters (LoRA) in PEFT's format: matrices A and B for each adapted module.

Legend: R rank, I input and O output of a module, both flattened.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from jaxgpt import tree
from jaxgpt.errors import UserError
from jaxgpt.hf.convert import Published
from jaxgpt.model import lora
from jaxgpt.tree import PyTree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def publish(
  published: Sequence[Published], params: PyTree, c_model: ml_collections.ConfigDict
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Names the adapters of a model after the modules that they adapt.

  A module that holds several of our weights side by side (GPT-2's c_attn: queries, keys, values)
  has one pair of matrices in PEFT. A then stacks the A of each weight, and B is block diagonal:

      A = [A_q]     B = [B_q  0    0 ]
          [A_k]         [0    B_k  0 ]
          [A_v]         [0    0    B_v]

  Its rank is the sum of the ranks. A weight without an adapter contributes rows of zeros to B.

  Args:
    published: From `convert.publish`, of the model without adapters.
    params: All parameters, adapters included.
    c_model: The config's `model` section.

  Returns:
    {tensor name: float32 array}, and the fields of adapter_config.json that the adapters decide.

  Raises:
    UserError: PEFT has no format for these adapters.
  """
  if c_model.latent.kv_rank:
    raise UserError(
      f"model.latent.kv_rank={c_model.latent.kv_rank}: PEFT has no format for adapters of latent "
      "attention; export the merged model, without --adapter"
    )
  adapters = {
    path: [np.asarray(x) for x in pair]
    for path, pair in lora.adapters(tree.flatten(params)).items()
  }
  tensors: dict[str, np.ndarray] = {}
  ranks: dict[str, int] = {}
  inputs_first = False  # the modules store [in, out], as GPT-2's Conv1D does
  for p in published:
    if not any(piece.path in adapters for piece in p.pieces):
      continue
    module = p.name.removesuffix(".weight")
    a_RI, b_OR = _blocks(p, adapters)
    tensors[f"base_model.model.{module}.lora_A.weight"] = a_RI
    tensors[f"base_model.model.{module}.lora_B.weight"] = b_OR
    ranks[module] = len(a_RI)
    inputs_first |= p.pieces[0].layout.inputs_first
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


def _blocks(
  p: Published, adapters: Mapping[str, Sequence[np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns A [R, I] and B [O, R] of a published tensor, see `publish`."""
  lead = p.pieces[0].lead
  a_blocks, b_blocks = [], []
  for piece in p.pieces:
    if piece.path in adapters:
      a, b = (x[lead] for x in adapters[piece.path])
      a_blocks.append(a.reshape(-1, a.shape[-1]).T)
      b_blocks.append(b.reshape(b.shape[0], -1).T)
    else:
      b_blocks.append(np.zeros((piece.layout.their_shape[p.axis], 0), np.float32))
  a_RI = np.concatenate(a_blocks)
  b_OR = np.zeros((sum(len(block) for block in b_blocks), len(a_RI)), np.float32)
  row = column = 0
  for block in b_blocks:
    b_OR[row : row + len(block), column : column + block.shape[1]] = block
    row, column = row + len(block), column + block.shape[1]
  return np.ascontiguousarray(a_RI), b_OR
