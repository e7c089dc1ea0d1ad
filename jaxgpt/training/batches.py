"""Batches of a config: the tokenizer, the splits of its data, and their transfer to devices.

A batch is a dict of NumPy arrays on each process and becomes a dict of global `jax.Array`s, sharded
over the mesh by row. `training.loop`, `training.evaluation`, doctor and inspect share this file.
"""

from typing import TypedDict

import jax
import ml_collections
from etils import epath

from jaxgpt import config
from jaxgpt.data import masking, pipeline, stream
from jaxgpt.errors import UserError
from jaxgpt.parallel import sharding
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib
from jaxgpt.tree import PyTree


def load_tokenizer_and_config(
  c: ml_collections.ConfigDict,
) -> tuple[tokenizer_lib.Tokenizer, ml_collections.ConfigDict]:
  """Loads the data's tokenizer and resolves the config with its vocabulary size.

  Args:
    c: A config from `config.load`; unchanged.

  Returns:
    (tokenizer, resolved config).

  Raises:
    UserError: `data.path` is not set, or the tokenizer has more ids than `model.vocab_size`.
  """
  if not c.data.path:
    raise UserError(
      "data.path is not set; prepare text with "
      '"jaxgpt data --out=DIR FILES…" and add --config.data.path=DIR'
    )
  first = pipeline.check_sources(c.data.path)[0]
  tokenizer = tokenizer_lib.load(epath.Path(first) / "tokenizer")
  c = config.resolve(c, vocab_size=tokenizer.vocab_size)
  if tokenizer.vocab_size > c.model.vocab_size:
    raise UserError(
      f"model.vocab_size={c.model.vocab_size} is smaller than the "
      f"{tokenizer.vocab_size} ids of the tokenizer in data.path={c.data.path!r}"
    )
  return tokenizer, c


def split_batches(
  c: ml_collections.ConfigDict, split: str, batch_size: int | None = None
) -> pipeline.Batches:
  """Opens the batches of one split of the config's prepared folders.

  Args:
    c: A resolved config.
    split: 'train', 'validation' or 'test'.
    batch_size: Rows of a global batch; None for `data.batch_size`.

  Raises:
    UserError: The data does not fit the objective or the model's labels.
  """
  masked = None
  if c.objective.name == "masked_lm":
    tokenizer = tokenizer_lib.load(pipeline.folders(c.data.path)[0])
    masked = masking.make(c.objective, tokenizer, c.seed)
  data = pipeline.make(
    c.data.path,
    split,
    seq_len=c.data.seq_len,
    packing=c.data.packing,
    seed=c.seed,
    batch_size=batch_size or c.data.batch_size,
    shuffle=c.data.shuffle,
    weights=c.data.weights,
    weight_changes=c.data.weight_changes,
    objective=c.objective.name,
    masking=masked,
  )
  if c.objective.name == "classification":
    data.check_labels(c.model.num_labels)
  return data


def training_data(c: ml_collections.ConfigDict) -> pipeline.Batches | stream.Stream:
  """Opens the batches that a resolved config trains on: prepared folders, or a stream of files."""
  d = c.data
  if not d.stream:
    return split_batches(c, "train")
  tokenizer = tokenizer_lib.load(pipeline.folders(d.path)[0])
  return stream.make(
    d.stream,
    d.path,
    tokenizer,
    field=d.stream_field,
    seq_len=d.seq_len,
    batch_size=d.batch_size,
    packing=d.packing,
    window=d.stream_window,
    seed=c.seed,
    shuffle=d.shuffle,
  )


def to_devices(batch: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
  """Transfers this process's rows of a batch, explicitly, as its shards of global arrays."""
  rows, count = sharding.batch_sharding(mesh), sharding.host_slice(mesh)[1]
  return jax.tree.map(lambda x: sharding.global_array(rows, x, count), batch)


class HostShare(TypedDict):
  """The rows of a batch that this process reads, as keyword arguments of a batch source."""

  host_index: int
  host_count: int


def host_share(mesh: jax.sharding.Mesh) -> HostShare:
  """The share of each global batch that this process reads."""
  index, count = sharding.host_slice(mesh)
  return HostShare(host_index=index, host_count=count)
