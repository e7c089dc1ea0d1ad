"""A folder with a published model: its config.json and its tensors together.

The two may disagree. Where transformers has a rule for that, this module follows it and adds a
note. Everything else is refused.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.hf import adapters, convert, safetensors
from jaxgpt.hf.config_map import Fields
from jaxgpt.hf.families import Family
from jaxgpt.hf.safetensors import Tensor
from jaxgpt.run import init_from

_BLOCK = 1 << 12  # rows of a tensor that are compared at a time


class ModelFolder(NamedTuple):
  """A published model whose weights are not read yet.

  Attributes:
    folder: The folder.
    family: The model's family.
    fields: {flat field of `model`: value}.
    tensors: {name in the files: tensor}.
    says_tied: Whether config.json says that embeddings are tied. Their values may say otherwise,
      then `fields` does too.
    notes: Sentences for the user on what is not read, or not as config.json says.
  """

  folder: epath.Path
  family: Family
  fields: Fields
  tensors: Mapping[str, Tensor]
  says_tied: bool
  notes: list[str]


def read_config(folder: epath.Path) -> convert.Reading:
  """Reads the config.json of a folder in Hugging Face's format.

  Raises:
    UserError: There is no config.json, or its model is not supported.
  """
  if not (folder / "config.json").exists():
    raise UserError(
      f"{folder} holds no config.json; name a folder as transformers' save_pretrained writes it"
    )
  if (folder / adapters.CONFIG).exists():
    raise UserError(
      f"{folder} holds {adapters.CONFIG}: transformers would add the adapter to the weights; merge "
      "it with peft's merge_and_unload and save_pretrained, or remove the file"
    )
  return convert.read(init_from.read_config_json(folder))


def read(folder: epath.Path) -> ModelFolder:
  """Reads config.json and the headers of the tensors' files, and settles what they disagree on.

  Args:
    folder: As transformers' `save_pretrained` writes it.

  Raises:
    UserError: The model is not supported, or a file is missing or broken.
  """
  family, fields, notes = read_config(folder)
  notes = [*notes, *safetensors.passed_over(folder)]
  tensors = safetensors.scan(folder)
  there = convert.full_names(family, {t.name for t in family.tensors}, tensors)
  tied = bool(fields["tie_embeddings"])
  if fields["head"] == "pooler" and not _pooler_names(family) & there.keys():
    fields = fields | convert.WITHOUT_POOLER
    notes.append("the files hold no pooler: the model ends with its hidden states")
  if tied and fields["head"] == "lm" and (name := _other_head(family, there, tensors)):
    fields = fields | {"tie_embeddings": False}
    notes.append(
      f"tie_word_embeddings=true, but {name} is not the embedding: read as a head of its own"
    )
  return ModelFolder(folder, family, fields, tensors, tied, notes)


def _pooler_names(family: Family) -> set[str]:
  return {t.name for t in family.tensors if "pooler" in t.when}


def _other_head(
  family: Family, there: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> str | None:
  """Returns the name of a stored LM head that differs from the embedding, or None."""
  embed = next(t.name for t in family.tensors if t.pieces[0].path == "embed")
  head = next((name for name in convert.head_names(family) if name in there), None)
  if head is None or embed not in there or _same(tensors[there[embed]], tensors[there[head]]):
    return None
  return there[head]


def _same(a: Tensor, b: Tensor) -> bool:
  """Whether two tensors hold the same numbers. Reads a block of rows at a time."""
  if a.shape != b.shape:
    return False
  rest = tuple((0, n) for n in a.shape[1:])
  for start in range(0, a.shape[0], _BLOCK):
    rows = ((start, min(start + _BLOCK, a.shape[0])), *rest)
    x, y = (safetensors.read(t, rows).astype(np.float32) for t in (a, b))
    if not np.array_equal(x, y, equal_nan=True):
      return False
  return True
