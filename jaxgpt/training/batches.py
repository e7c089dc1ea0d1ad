"""Batches of a config: the tokenizer, the splits of its data, and their transfer to devices.

A batch is a dict of NumPy arrays on each process and becomes a dict of global `jax.Array`s, sharded
over the mesh by row. `training.loop`, `training.evaluation`, doctor and inspect share this file.
"""

from typing import TypedDict

import jax
import ml_collections
from etils import epath

from jaxgpt import config
from jaxgpt.data import from_config, pipeline, stages
from jaxgpt.data.batch_source import BatchSource
from jaxgpt.errors import UserError
from jaxgpt.parallel import sharding
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib
from jaxgpt.training import objectives
from jaxgpt.tree import PyTree


def load_tokenizer_and_config(
  c: ml_collections.ConfigDict,
) -> tuple[tokenizer_lib.Tokenizer, ml_collections.ConfigDict]:
  """Loads the data's tokenizer and resolves the config with its vocabulary size.

  Args:
    c: A config from `config.load`. It stays unchanged.

  Returns:
    (tokenizer, resolved config).

  Raises:
    UserError: `data.path` is not set, or the tokenizer has more ids than `model.vocab_size`, added
      tokens excepted. Batches that use one of those are refused.
  """
  if not c.data.path:
    raise UserError(
      "data.path is not set; prepare text with "
      '"jaxgpt data --out=DIR FILES…" and add --config.data.path=DIR'
    )
  first = pipeline.check_sources(c.data.path)[0]
  tokenizer = tokenizer_lib.load(epath.Path(first) / "tokenizer")
  c = config.resolve(c, vocab_size=tokenizer.vocab_size)
  try:
    tokenizer.ids_beyond(c.model.vocab_size)
  except UserError as e:
    raise UserError(
      f"model.vocab_size={c.model.vocab_size} is smaller than the "
      f"{tokenizer.vocab_size} ids of the tokenizer in data.path={c.data.path!r}; raise it"
    ) from e
  return tokenizer, c


def split_batches(
  c: ml_collections.ConfigDict, split: str, batch_size: int | None = None
) -> pipeline.Batches:
  """Opens the batches of one split of the config's prepared folders.

  Args:
    c: A resolved config.
    split: 'train', 'validation' or 'test'.
    batch_size: Rows of a global batch, or None for `data.batch_size`.

  Raises:
    UserError: The data does not fit the objective or the model's labels.
  """
  return from_config.split_batches(c, split, objectives.find(c).layout, batch_size)


def validation(c: ml_collections.ConfigDict) -> pipeline.Batches | None:
  """Opens the validation split in batches of `eval.batch_size`, or None if the data has none."""
  if "validation" not in pipeline.splits_with_documents(c.data.path):
    return None
  return split_batches(c, "validation", c.eval.batch_size)


def training_data(c: ml_collections.ConfigDict) -> BatchSource:
  """Opens the batch source that a resolved config trains on."""
  return from_config.training_data(c, objectives.find(c).layout)


def to_devices(batch: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
  """Transfers this process's rows of a batch, explicitly, as its shards of global arrays."""
  rows, count = sharding.batch_sharding(mesh), sharding.host_slice(mesh)[1]
  return jax.tree.map(lambda x: sharding.global_array(rows, x, count), batch)


def shapes(data: BatchSource, stage: stages.Stage) -> PyTree:
  """The global batch of a stage as a tree of `ShapeDtypeStruct`s."""
  if isinstance(data, stages.StagedBatches):
    data = data.at(stage.start)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((stage.batch_size, *x.shape[1:]), x.dtype), data.blank(1)
  )


class HostShare(TypedDict):
  """The rows of a batch that this process reads, as keyword arguments of a batch source."""

  host_index: int
  host_count: int


def host_share(mesh: jax.sharding.Mesh) -> HostShare:
  """The share of each global batch that this process reads."""
  index, count = sharding.host_slice(mesh)
  return HostShare(host_index=index, host_count=count)
