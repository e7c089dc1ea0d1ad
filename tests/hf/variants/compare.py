"""A variant of a published model, and its comparison with transformers."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers
from etils import epath
from safetensors.torch import load_file, save_file

from jaxgpt.commands.actions import import_export
from jaxgpt.errors import UserError
from jaxgpt.hf import convert, parity

PROMPT = [3, 40, 41, 9, 17, 60, 5, 33, 2, 50, 21, 7]
NEAR = 1e-5  # of the largest value
IDS = dict(vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)

Tensors = dict[str, torch.Tensor]
Json = dict[str, Any]


class Variant(NamedTuple):
  """A model and the edits of its folder."""

  name: str
  cls: str  # class of transformers
  config: Json  # values of its config class
  edit: Json  # keys of config.json that are replaced; ... removes a key
  tensors: Callable[[Tensors], Tensors] | None = None
  files: Callable[[pathlib.Path], None] | None = None
  load: str = ""  # class that loads the folder, if another


class Outcome(NamedTuple):
  """How an import compares: 'equal', 'different', 'refused' or 'invalid', and a message.

  'different' also stands for an import whose export is another model. 'invalid': transformers does
  not load the folder either, and the import took it.
  """

  kind: str
  message: str


def save(variant: Variant, folder: pathlib.Path) -> None:
  """Makes the folder of a variant, with random weights, norms and biases too."""
  cls = getattr(transformers, variant.cls)
  torch.manual_seed(0)
  model = cls(cls.config_class(**variant.config)).eval()
  buffers = (b for n, b in model.named_buffers() if "correction_bias" in n)
  for p in [*model.parameters(), *buffers]:
    p.data += 0.1 * torch.randn_like(p)
  model.save_pretrained(folder)
  if variant.edit:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | variant.edit
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
  if variant.tensors:
    path = folder / "model.safetensors"
    save_file(variant.tensors(load_file(path)), path, {"format": "pt"})
  if variant.files:
    variant.files(folder)


def theirs(variant: Variant, folder: pathlib.Path, head: str) -> np.ndarray:
  """The outputs of transformers. `head` is our model's."""
  cls = getattr(transformers, variant.load or variant.cls)
  model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
  with torch.no_grad():
    return parity.answer(model(torch.tensor([PROMPT])), head)[0].numpy()


def ours(model: import_export.ReadModel) -> np.ndarray:
  """The outputs of the imported model."""
  row = np.array([PROMPT], np.int32)
  positions = np.arange(len(PROMPT), dtype=np.int32)[None]
  run = jax.jit(
    lambda p, *args: model.parts.model.apply({"params": p}, *args).logits,
    compiler_options={"xla_backend_optimization_level": 0},
  )
  return np.asarray(run(model.params, row, positions, np.ones_like(row)))[0]


def export(model: import_export.ReadModel, folder: pathlib.Path) -> None:
  """Writes an imported model as `jaxgpt export` does, without a tokenizer and a certificate."""
  folder.mkdir()
  family = convert.family_of(model.c.model)
  import_export.write_weights(epath.Path(folder), family, model.c.model, model.params)
  hf = convert.write(family, model.c.model) | IDS | {"torch_dtype": "float32"}
  if family.model_type in ("roberta", "xlm-roberta", "camembert"):
    hf["pad_token_id"] = 1
  (folder / "config.json").write_text(json.dumps(hf))


def outcome(variant: Variant, folder: pathlib.Path) -> Outcome:
  """Saves a variant, imports it, compares, exports it and compares again."""
  save(variant, folder / "theirs")
  try:
    model = import_export.read_model(epath.Path(folder / "theirs"))
  except UserError as e:
    return Outcome("refused", str(e))
  mine = ours(model)
  try:
    want = theirs(variant, folder / "theirs", model.c.model.head)
  except Exception as e:  # whatever transformers raises for a folder that it does not take
    return Outcome("invalid", f"{type(e).__name__}: {e}"[:300])
  if (off := _distance(mine, want)) > NEAR:
    return Outcome("different", f"{off:.1e}")
  export(model, folder / "back")
  kinds = [
    json.loads((folder / x / "config.json").read_text())["model_type"] for x in ("theirs", "back")
  ]
  if kinds[0] != kinds[1]:
    return Outcome("different", f"{kinds[0]} is exported as {kinds[1]}")
  if (back := _distance(mine, theirs(variant, folder / "back", model.c.model.head))) > NEAR:
    return Outcome("different", f"{back:.1e} after export")
  return Outcome("equal", f"{off:.1e}, {back:.1e} after export")


def _distance(a: np.ndarray, b: np.ndarray) -> float:
  """The largest difference as a fraction of the largest value, or infinity for other shapes."""
  if a.shape != b.shape:
    return float("inf")
  off = np.abs(a - b).max() / max(1.0, np.abs(b).max())
  return float(off) if np.isfinite(off) else float("inf")
