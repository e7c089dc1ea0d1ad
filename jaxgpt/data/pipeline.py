"""Batches of prepared folders: the batch at step N is a function of (data, config, seed, N).

Suffixes: B rows of a batch, T places in a row.
"""

import hashlib
import os
import pathlib
import sys
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxgpt.data import layouts, mixture, source
from jaxgpt.data import packing as packings
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import shards


class Row(NamedTuple):
  """Where a row of a batch comes from."""

  position: int  # number in the endless sequence of rows: step * B + its place in the batch
  source: int  # number of its source
  epoch: int  # how often all rows of its source have been seen before
  row: int  # number in the source's pack index


class Source(NamedTuple):
  """One prepared folder in a mixture."""

  name: str
  split: source.Split
  pack: packings.PackIndex
  order: Any  # number of a row in the source's endless sequence of epochs -> row of `pack`


def folders(path):
  """The folders that `data.path` names: several are separated by commas."""
  if not isinstance(path, str):
    return [path]
  return [part.strip() for part in path.split(",") if part.strip()]


def check_sources(path):
  """Checks that the folders of `data.path` are prepared data in the tokens of one tokenizer.

  Args:
    path: as `folders` takes it.

  Returns:
    The folders.

  Raises:
    UserError: a folder is none, or has another tokenizer than the first.
  """
  found = folders(path)
  first = None
  for folder in found:
    tokenizer = shards.read_manifest(folder)["tokenizer"]
    first = first or tokenizer
    if tokenizer["digest"] != first["digest"]:
      raise UserError(
        f"data.path mixes tokenizers: {os.fspath(folder)!r} was written with {tokenizer['kind']} "
        f"{tokenizer['digest'][:12]}, {os.fspath(found[0])!r} with {first['kind']} "
        f"{first['digest'][:12]}; prepare it again with --tokenizer={os.fspath(found[0])}"
      )
  return found


def make(
  path,
  split,
  *,
  seq_len,
  batch_size,
  packing="best_fit",
  seed=0,
  shuffle=True,
  weights=(),
  weight_changes=(),
  objective="causal_lm",
  masking=None,
):
  """Opens a split of each source and packs it.

  Args:
    path: what `jaxgpt data` wrote; several folders are separated by commas.
    split: 'train', 'validation' or 'test'. But for 'train', folders where it is empty are left
      out.
    seq_len: predictions, or tokens, that a row has room for (T).
    batch_size: rows a step over all hosts (global B). It may exceed the rows of the split: epochs
      then follow each other within a batch.
    packing: best_fit, concat or one_per_row (see `packing`).
    seed: of the order of the rows; any integer.
    shuffle: permute the rows anew each epoch; else they come in the documents' order.
    weights: share of the rows that comes from each folder; (): in proportion to its rows, so that
      the epochs of all sources end together.
    weight_changes: ((step, weights), …) in rising order: weights from those steps on.
    objective: a key of `layouts.OBJECTIVES`, which says what rows hold.
    masking: masked_lm: from `masking.make`.

  Returns:
    Batches.

  Raises:
    UserError: a value out of range, or what `source.open_split` raises.
  """
  for key, value in (("seq_len", seq_len), ("batch_size", batch_size)):
    if value < 1:
      raise UserError(f"data.{key}={value} must be at least 1")
  if packing not in packings.PACKINGS:
    raise UserError(f"data.packing={packing!r}: choose one of {', '.join(packings.PACKINGS)}")
  found = check_sources(path)
  digest = digest_of([shards.read_manifest(folder)["digest"] for folder in found])
  if split != "train":
    found = [f for f in found if shards.read_manifest(f)["splits"][split]["documents"]] or found[:1]
    weights = weight_changes = ()
  splits = [(name, source.open_split(folder, split)) for name, folder in zip(_names(found), found)]
  layout = layouts.make(objective, splits, masking)
  sources, num_cut = [], 0
  for number, (name, opened) in enumerate(splits):
    pack, cut = layout.index(opened, packing, seq_len)
    order = _order(pack.num_rows, seed if shuffle else None, number)
    sources.append(Source(name, opened, pack, order))
    num_cut += cut
  mix = mixture.Mixture(
    len(sources),
    weights or [s.pack.num_rows for s in sources],
    [(step * batch_size, w) for step, w in weight_changes],
    seed,
  )
  return Batches(sources, mix, batch_size, layout, num_cut, digest)


def _names(found):
  """Short names of folders, all different."""
  short = [pathlib.PurePath(f).name for f in found]
  return short if len(set(short)) == len(short) else [os.fspath(f) for f in found]


def _order(num_rows, seed, number):
  """The endless sequence of a source's epochs, each a permutation of its rows."""
  order = grain.MapDataset.range(num_rows)
  if seed is not None:
    # Grain seeds epoch e with seed + e, so neighbouring seeds would share their epochs.
    mixed = np.random.SeedSequence(seed % 2**64, spawn_key=(number,) if number else ())
    order = order.shuffle(seed=int(mixed.generate_state(1)[0]))
  return order.repeat()


class Batches:
  """Batches by step number.

  A batch is a dict of arrays [B, T], those of the objective's layout (see `layouts`). Row i of step N has position N * B + i in an endless sequence, in which the sources take turns by
  their weights and each goes through its own epochs. Host h of H gets the rows h * B / H to
  (h + 1) * B / H of each step. Picklable.

  Attributes:
    sources: [Source].
    layout: see `layouts`.
    batch_size: global B.
    seq_len: T.
    len_rows: rows of all sources.
    steps_per_epoch: ceil(len_rows / B).
    bytes: UTF-8 bytes of the texts, which bits per byte are counted over.
    predictions: predictions of all sources.
    digest: of the manifest, or of all manifests of `data.path`, whichever have the split.
    predicts_all: whether an epoch predicts each token once, so that bits per byte have a meaning.
    num_documents: documents of all sources.
    num_cut: documents that lost an end to fit into a row.
    state_key: None; the batch at step N depends on N only (see `batch_source`).
  """

  state_key: str | None = None

  def __init__(self, sources, mix, batch_size, layout, num_cut, digest):
    """Use `make`."""
    self.sources, self._mixture, self.batch_size = sources, mix, batch_size
    self.layout, self.num_cut, self.digest = layout, num_cut, digest
    self.seq_len = sources[0].pack.seq_len
    self._ends = np.cumsum([s.pack.num_rows for s in sources])
    self.len_rows = int(self._ends[-1])
    self.steps_per_epoch = -(-self.len_rows // batch_size)
    self.num_documents = sum(s.split.num_documents for s in sources)
    self.bytes = sum(s.split.bytes for s in sources)
    self.predictions = sum(int(s.split.lengths.sum()) for s in sources)
    self.predicts_all = isinstance(layout, layouts.CausalLM) and all(
      s.split.kind == "text" for s in sources
    )

  def by_source(self):
    """{name: Batches of that source alone}, for what looks at each on its own."""
    alone = mixture.Mixture(1, [1])
    return {
      s.name: Batches([s], alone, self.batch_size, self.layout, 0, s.split.digest)
      for s in self.sources
    }

  def host_checks(self):
    """See `BatchSource`; `digest` says it all."""
    return []

  def describe(self, host_count=1):
    """Lines for the start of a run: documents that lost an end."""
    del host_count
    if not self.num_cut:
      return []
    return [
      f"{self.num_cut:,} of {self.num_documents:,} documents are longer than data.seq_len="
      f"{self.seq_len} and lose an end"
    ]

  def summary(self):
    """Steps of an epoch, in words."""
    return f"shards have their sizes; an epoch has {self.steps_per_epoch:,} steps"

  def account(self):
    """No lines: prepared data was accounted for when it was prepared."""
    return []

  def get_state(self):
    """None; see `state_key`."""
    return None

  def merge_states(self, states):
    """None; see `state_key`."""
    del states
    return None

  def set_state(self, merged, host_index, host_count):
    """Does nothing; see `state_key`."""

  def check_labels(self, num_labels):
    """Raises a UserError where a model with so many labels can't learn those of the data."""
    names = self.sources[0].split.label_names
    if names and not 1 < num_labels >= len(names):
      raise UserError(
        f"model.num_labels={num_labels}, but the data has {len(names)} classes "
        f"({', '.join(names[:10])}): set model.num_labels={max(len(names), 2)}"
      )
    if not names and num_labels != 1:
      raise UserError(
        f"model.num_labels={num_labels}, but the labels of the data are numbers and "
        "no classes: set model.num_labels=1 for a regression"
      )

  def rows(self, step, host_index=0, host_count=1):
    """What a host gets at a step: a list of B / host_count `Row`s.

    With `pack.spans` and `split.source_name` of their sources they tell which documents were in a
    step.

    Raises:
      UserError: host_count does not divide the batch size.
      IndexError: no such step or host.
    """
    low, high = self._host_rows(host_index, host_count)
    if step < 0:
      raise IndexError(f"step {step} is negative")
    first = step * self.batch_size + low
    chosen, numbers = self._mixture.locate(first, high - low)
    out = []
    for i, (number, n) in enumerate(zip(chosen.tolist(), numbers.tolist())):
      s = self.sources[number]
      out.append(Row(first + i, number, n // s.pack.num_rows, s.order[n]))
    return out

  def _host_rows(self, host_index, host_count):
    if host_count < 1 or self.batch_size % host_count:
      raise UserError(
        f"data.batch_size={self.batch_size} does not split evenly over {host_count} "
        "hosts; choose a multiple"
      )
    if not 0 <= host_index < host_count:
      raise IndexError(f"host {host_index} of {host_count}")
    per_host = self.batch_size // host_count
    return host_index * per_host, (host_index + 1) * per_host

  def epochs(self, step):
    """How often each source was gone through before a step: {name: epochs, with a fraction}."""
    counts = self._mixture.counts(step * self.batch_size)
    return {s.name: n / s.pack.num_rows for s, n in zip(self.sources, counts)}

  def batch(self, step, host_index=0, host_count=1):
    """A host's part of the batch at a step: a dict of arrays [B / host_count, T].

    Raises: as `rows`.
    """
    rows = self.rows(step, host_index, host_count)
    return self._assemble([(r.source, r.row, r.position) for r in rows], len(rows))

  def blank(self, rows):
    """A batch of padding, whose shapes and dtypes are those of all batches of so many rows."""
    return self.layout.batch([], rows, self.seq_len)

  def iterate(
    self, start_step=0, *, stop_step=None, host_index=0, host_count=1, threads=4, prefetch=4
  ):
    """Iterates over `batch(start_step)`, `batch(start_step + 1)`, … made ahead of time.

    Args:
      start_step: the first step.
      stop_step: the step to stop before; default: never.
      host_index, host_count: as in `batch`.
      threads: that make batches; 0 makes them when asked.
      prefetch: batches kept ready; 0 makes them when asked.

    Returns:
      A Grain iterator; its `close()` ends the threads.

    Raises: as `rows`.
    """
    self._host_rows(host_index, host_count)
    steps = grain.MapDataset.range(start_step, sys.maxsize if stop_step is None else stop_step)
    batches = steps.map(lambda step: self.batch(step, host_index, host_count))
    return self._prefetched(batches, threads, prefetch)

  def _prefetched(self, batches, threads, prefetch):
    options = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))

  def epoch_batches(self, *, host_index=0, host_count=1, threads=4, prefetch=4):
    """Iterates over all rows of all sources once, in the documents' order: for evaluation.

    The last batch is filled up with rows of zero weight, so all have one shape and all hosts the
    same number. Over all of them the loss, summed with its weights and divided by
    `bytes * ln 2`, is bits per byte.

    Args:
      host_index, host_count, threads, prefetch: as in `iterate`.

    Raises: as `rows`.
    """
    low, high = self._host_rows(host_index, host_count)

    def batch(step):
      first = step * self.batch_size
      numbers = np.arange(min(first + low, self.len_rows), min(first + high, self.len_rows))
      chosen = np.searchsorted(self._ends, numbers, side="right")
      begins = np.concatenate(([0], self._ends))
      rows = zip(chosen.tolist(), (numbers - begins[chosen]).tolist(), numbers.tolist())
      return self._assemble(list(rows), high - low)

    batches = grain.MapDataset.range(self.steps_per_epoch).map(batch)
    return self._prefetched(batches, threads, prefetch)

  def _assemble(self, rows, num_rows):
    """The batch of some rows [(source, row, position)], filled up to `num_rows`."""
    items = [
      layouts.Item(self.sources[s].split, self.sources[s].pack, row, position)
      for s, row, position in rows
    ]
    return self.layout.batch(items, num_rows, self.seq_len)


def digest_of(digests):
  """What names the data of a run: the manifest's digest, or one over those of all sources."""
  if len(digests) == 1:
    return digests[0]
  return hashlib.sha256("\n".join(digests).encode()).hexdigest()
