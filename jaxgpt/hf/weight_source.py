"""Initial weights of a run from a model in Hugging Face's format."""

import ml_collections
from etils import epath

from jaxgpt import tree
from jaxgpt.errors import UserError
from jaxgpt.hf import convert, families, safetensors, weights
from jaxgpt.run import init_from


def read_family(folder: epath.Path) -> tuple[families.Family, dict]:
  """(Family, config.json as a dict) of a folder in Hugging Face's format.

  Raises:
    UserError: There is no config.json, or its model is not supported.
  """
  if not (folder / "config.json").exists():
    raise UserError(
      f"{folder} holds no config.json; name a folder as transformers' save_pretrained writes it"
    )
  hf = init_from.read_config_json(folder)
  return convert.read(hf)[0], hf


class HuggingFaceSource:
  """Reads folders as transformers' `save_pretrained` writes them; an `init_from.WeightSource`."""

  def recognizes(self, folder: epath.Path) -> bool:
    """Whether the folder holds a config.json that is not a run's."""
    return (folder / "config.json").exists() and not init_from.is_run(folder)

  def check(self, folder: epath.Path) -> None:
    """Raises a UserError if the folder's model is not supported. Reads no weights."""
    read_family(folder)

  def load(
    self, folder: epath.Path, c_model: ml_collections.ConfigDict, abstract: tree.PyTree
  ) -> init_from.Weights:
    """See `init_from.WeightSource`. The tokenizer is not read."""
    family, hf = read_family(folder)
    tensors = safetensors.scan(folder)
    published = convert.publish(family, c_model, abstract, partly=True)
    found = convert.find(family, published, tensors, c_model.tie_embeddings)
    # A parameter of all layers is an error if only some of its layers are there, and is
    # initialized if none is.
    paths = lambda published: {piece.path for p in published for piece in p.pieces}
    torn = paths(found.missing) & paths(p for p, _ in found.pairs)
    found = found._replace(missing=[p for p in found.missing if paths([p]) & torn], extra=[])
    convert.check(found, tensors, folder)
    used = {id(tensor) for _, tensor in found.pairs}
    return init_from.Weights(
      weights.load(found.pairs, abstract),
      [name for name, tensor in tensors.items() if id(tensor) not in used],
      convert.configured(convert.read(hf)[1]).model,
      tokenizer=None,
    )


# The formats besides run folders, as commands pass them to `training.loop.train`.
WEIGHT_SOURCES: tuple[init_from.WeightSource, ...] = (HuggingFaceSource(),)
