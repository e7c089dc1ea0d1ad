"""The data of a config: its batch source for training, and its held-out splits.

To add a batch source, implement `batch_source.BatchSource`, declare the config key that turns it
on, and add an entry to `BATCH_SOURCES`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import ml_collections

from jaxgpt.config.registry import Registry
from jaxgpt.data import layouts, masking, pipeline, stages, stream
from jaxgpt.data.batch_source import Batching, BatchSource
from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib


class BatchSourceEntry(NamedTuple):
  """A kind of batch source.

  Attributes:
    key: The config key that turns it on when it has a value.
    make: Opens the source that a resolved config describes, in a row layout.
    summary: One line for the documentation.
  """

  key: str
  make: Callable[[ml_collections.ConfigDict, str], BatchSource]
  summary: str


def batching(c: ml_collections.ConfigDict, batch_size: int | None = None) -> Batching:
  """The settings of batches of a resolved config, or those with another batch size."""
  d = c.data
  return Batching(
    seq_len=d.seq_len,
    batch_size=batch_size or d.batch_size,
    packing=d.packing,
    seed=c.seed,
    shuffle=d.shuffle,
  )


def split_batches(
  c: ml_collections.ConfigDict,
  split: str,
  layout: str,
  batch_size: int | None = None,
  rows_before: Callable[[int], int] | None = None,
) -> pipeline.Batches:
  """Opens a split of the prepared folders of a config.

  Args:
    c: The config. Without `model.vocab_size`, tokens beyond the model's rows are not looked for.
    split: 'train', 'validation' or 'test'.
    layout: The row layout that the objective reads, a key of `layouts.LAYOUTS`.
    batch_size: Rows of a batch, `data.batch_size` by default.
    rows_before: See `pipeline.make`.

  Raises:
    UserError: The folder is damaged, or its data does not fit the objective or the model.
  """
  entry, masked = layouts.LAYOUTS[layout], None
  if entry.needs_masking:
    tokenizer = tokenizer_lib.load(pipeline.folders(c.data.path)[0])
    masked = masking.make(c.objective, tokenizer, c.seed, c.model.vocab_size)
  data = pipeline.make(
    c.data.path,
    split,
    batching(c, batch_size),
    weights=c.data.weights,
    weight_changes=c.data.weight_changes,
    layout=layout,
    masking=masked,
    label_names=c.model.label_names if entry.has_labels else (),
    num_labels=c.model.num_labels if entry.has_labels else None,
    overlap=c.data.overlap,
    rows_before=rows_before,
  )
  rows = c.model.vocab_size
  for of_folder in data.sources:
    if rows and of_folder.split.manifest["tokenizer"]["vocab_size"] > rows:
      of_folder.split.rows = rows
  if entry.has_labels:
    data.check_labels(c.model.num_labels)
  return data


def _prepared(c: ml_collections.ConfigDict, layout: str) -> BatchSource:
  if not c.data.stages:
    return split_batches(c, "train", layout)
  plan = stages.of(c.data)
  by_length = {}
  for stage, own in stages.configs(c):
    if stage.seq_len not in by_length:
      before = functools.partial(stages.rows_before, plan, stage.seq_len)
      by_length[stage.seq_len] = split_batches(own, "train", layout, rows_before=before)
  return stages.StagedBatches(plan, by_length)


def _stream(c: ml_collections.ConfigDict, layout: str) -> BatchSource:
  del layout  # The config's checks refuse data.stream for any other than causal_lm.
  d = c.data
  tokenizer = tokenizer_lib.load(pipeline.folders(d.path)[0])
  # Special tokens are never in a stream, whose texts are all from files.
  lost = tokenizer.ids_beyond(c.model.vocab_size).keys() - tokenizer.special_ids.keys()
  if lost:
    raise UserError(
      f"data.stream={d.stream!r} may hold {min(lost)!r}, for which the model has no row of its "
      f"embedding (model.vocab_size={c.model.vocab_size}); raise it, or prepare the data"
    )
  return stream.make(
    d.stream,
    d.path,
    tokenizer,
    batching(c),
    field=d.stream_field,
    window=d.stream_window,
    readers=d.stream_readers,
  )


# Later entries take precedence: data.path is always set, since it holds the validation split.
BATCH_SOURCES: Registry[BatchSourceEntry] = Registry("batch source")
BATCH_SOURCES.add(
  "prepared",
  BatchSourceEntry("data.path", _prepared, "the training split of prepared folders"),
)
BATCH_SOURCES.add(
  "stream",
  BatchSourceEntry("data.stream", _stream, "files that are read and tokenized while training"),
)


def training_data(c: ml_collections.ConfigDict, layout: str) -> BatchSource:
  """Opens the training data of a resolved config.

  The last entry of `BATCH_SOURCES` whose key has a value makes it.

  Args:
    c: The resolved config.
    layout: As in `split_batches`.

  Raises:
    UserError: No key has a value, or the data can't be opened.
  """
  for entry in reversed(list(BATCH_SOURCES.values())):
    section, _, key = entry.key.rpartition(".")
    if (c[section] if section else c)[key]:
      return entry.make(c, layout)
  keys = " or ".join(entry.key for entry in BATCH_SOURCES.values())
  raise UserError(f"the config names no training data: set {keys}")
