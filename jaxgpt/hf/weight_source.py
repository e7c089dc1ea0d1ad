"""Initial weights of a run from a model in Hugging Face's format."""

import ml_collections
from etils import epath

from jaxgpt import tree
from jaxgpt.errors import UserError
from jaxgpt.hf import config_map, convert, families, safetensors, weights
from jaxgpt.run import init_from


def read_family(folder: epath.Path) -> tuple[families.Family, config_map.HfConfig]:
  """Reads the config.json of a folder in Hugging Face's format.

  Returns:
    The family, and config.json as a dict.

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
  """An `init_from.WeightSource` for folders that transformers' `save_pretrained` writes."""

  def recognizes(self, folder: epath.Path) -> bool:
    """Returns whether the folder holds a config.json that is not a run's."""
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
    # A parameter that is stacked over layers is initialized if the files have none of its layers.
    # It is an error if they have some of them.
    paths = lambda published: {piece.path for p in published for piece in p.pieces}
    torn = paths(found.missing) & paths(p for p, _ in found.matched)
    found = found._replace(missing=[p for p in found.missing if paths([p]) & torn], extra=[])
    convert.check(found, tensors, folder)
    used = {id(tensor) for _, tensor in found.matched}
    return init_from.Weights(
      weights.load(found.matched, abstract),
      [name for name, tensor in tensors.items() if id(tensor) not in used],
      convert.configured(convert.read(hf)[1]).model,
      tokenizer=None,
    )


# The formats other than run folders. Commands pass them to `training.loop.train`.
WEIGHT_SOURCES: tuple[init_from.WeightSource, ...] = (HuggingFaceSource(),)
