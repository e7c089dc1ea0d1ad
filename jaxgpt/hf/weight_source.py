"""Initial weights of a run from a model in Hugging Face's format."""

import ml_collections
from etils import epath

from jaxgpt import tree
from jaxgpt.hf import convert, model_folder, weights
from jaxgpt.run import init_from, source_heads
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib


class HuggingFaceSource:
  """An `init_from.WeightSource` for folders that transformers' `save_pretrained` writes."""

  def recognizes(self, folder: epath.Path) -> bool:
    """Returns whether the folder holds a config.json that is not a run's."""
    return (folder / "config.json").exists() and not init_from.is_run(folder)

  def inspect(self, folder: epath.Path) -> init_from.Inspected:
    """See `init_from.WeightSource`."""
    c_model = convert.configured(model_folder.read_config(folder).fields).model
    tokenizer = tokenizer_lib.load(folder) if tokenizer_lib.folder_of(folder) else None
    return init_from.Inspected(c_model, tokenizer)

  def load(
    self, folder: epath.Path, c_model: ml_collections.ConfigDict, abstract: tree.PyTree
  ) -> init_from.Weights:
    """See `init_from.WeightSource`."""
    model = model_folder.read(folder)
    old = convert.configured(model.fields).model
    other = lambda p: any(source_heads.passed_over(x.path, old, c_model) for x in p.pieces)
    published = convert.publish(model.family, c_model, abstract, partly=True)
    published = [p for p in published if not other(p)]
    found = convert.find(model.family, c_model, published, model.tensors, model.says_tied)
    # A parameter that is stacked over layers is initialized if the files have none of its layers.
    # It is an error if they have some of them.
    paths = lambda published: {piece.path for p in published for piece in p.pieces}
    torn = paths(found.missing) & paths(p for p, _ in found.matched)
    found = found._replace(missing=[p for p in found.missing if paths([p]) & torn], extra=[])
    convert.check(found, model.tensors, folder)
    used = {id(tensor) for _, tensor in found.matched}
    return init_from.Weights(
      weights.load(found.matched, abstract),
      [name for name, tensor in model.tensors.items() if id(tensor) not in used],
    )


# The formats other than run folders. Commands pass them to `training.loop.train`.
WEIGHT_SOURCES: tuple[init_from.WeightSource, ...] = (HuggingFaceSource(),)
