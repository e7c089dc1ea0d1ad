"""Batches of prepared folders: the batch at step N is a pure function of (data, config, seed, N).

From a step to its tokens:

  step N, row i of the batch
    -> position N * B + i in the endless sequence of rows     (other sizes before: `stages`)
    -> (source, n): the row is the n-th of its source        (`mixture`)
    -> epoch n // R and row of the pack index, R rows long    (a Grain shuffle per epoch)
    -> spans (document, start, length) of that row            (`packing`)
    -> stored tokens                                          (`source`)
    -> arrays                                                 (`layouts`)

Every arrow is computed, so any host finds any row without having seen the others.

Suffixes of array names: B rows of a global batch, T positions in a row.
"""

import copy
import hashlib
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from etils import epath

from jaxgpt.data import batch_source, label_numbers, layouts, mixture, source
from jaxgpt.data import packing as packings
from jaxgpt.data.batch_source import Batch, Batching, BatchIterator, HostCheck
from jaxgpt.data.masking import Masking
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import shards


class Row(NamedTuple):
  """Origin of a row of a batch."""

  position: int  # global index of the row: step * B + its index in the batch
  source: int  # index of its source
  epoch: int  # complete passes over the source before this row
  row: int  # index in the source's pack index


class Source(NamedTuple):
  """One prepared folder in a mixture."""

  name: str
  split: source.Split
  pack: packings.PackIndex
  order: Any  # index in the source's endless sequence of epochs -> row of `pack` (Grain)


def folders(path: epath.PathLike) -> list[epath.PathLike]:
  """Splits `data.path` at its commas into the folders that it names."""
  if not isinstance(path, str):
    return [path]
  return [folder.strip() for folder in path.split(",") if folder.strip()]


def check_sources(path: epath.PathLike) -> list[epath.PathLike]:
  """Checks that the folders of `data.path` hold prepared data in the tokens of one tokenizer.

  Args:
    path: One or more folders. See `folders`.

  Returns:
    The folders.

  Raises:
    UserError: A folder holds no prepared data, or another tokenizer than the first.
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


def splits_with_documents(path: epath.PathLike) -> list[str]:
  """The splits that have documents in at least one folder of `data.path`."""
  entries = [shards.read_manifest(folder)["splits"] for folder in folders(path)]
  return [split for split in shards.SPLITS if any(e[split]["documents"] for e in entries)]


def make(
  path: epath.PathLike,
  split: str,
  batching: Batching,
  *,
  weights: Sequence[float] = (),
  weight_changes: Sequence[tuple[int, Sequence[float]]] = (),
  layout: str = "causal_lm",
  masking: Masking | None = None,
  label_names: Sequence[str] = (),
  num_labels: int | None = None,
  overlap: int | None = None,
  rows_before: Callable[[int], int] | None = None,
) -> "Batches":
  """Opens a split of each source and packs it.

  Args:
    path: One or more folders that `jaxgpt data` wrote. See `folders`.
    split: 'train', 'validation' or 'test'. For the last two, folders without documents in the
      split are left out.
    batching: Size, packing and order of the rows. If the batch size exceeds the rows of the split,
      a batch spans several epochs.
    weights: Share of the rows that each folder contributes. (): in proportion to its rows, so that
      the epochs of all sources end together.
    weight_changes: ((step, weights), …) with rising steps: the weights from each step on.
    layout: A key of `layouts.LAYOUTS`.
    masking: From `masking.make`, if the layout needs it.
    label_names: Names of the model's classes in the order of its outputs, which number the classes
      of each folder. (): as the folders number them.
    num_labels: Outputs of the model, see `layouts.Inputs`.
    overlap: Tokens that consecutive windows of a text share, see `layouts.Inputs`.
    rows_before: The rows in all steps before a step, if that is not `batching.batch_size` times the
      step (see `stages`). It places the `weight_changes`.

  Raises:
    UserError: See `check_sources`, `source.open_split`, `layouts.make` and `mixture.Mixture`.
  """
  found = check_sources(path)
  digest = digest_of([shards.read_manifest(folder)["digest"] for folder in found])
  if split != "train":
    found = [f for f in found if shards.read_manifest(f)["splits"][split]["documents"]] or found[:1]
    weights = weight_changes = ()
  splits = [(name, source.open_split(folder, split)) for name, folder in zip(_names(found), found)]
  for name, opened in splits:
    if label_names:
      opened.number_classes(label_names, f"data.path={str(name)!r}")
  inputs = layouts.Inputs(masking, num_labels=num_labels, overlap=overlap)
  made = layouts.make(layout, splits, inputs)
  sources, num_cut = [], 0
  for number, (name, opened) in enumerate(splits):
    pack, cut = made.index(opened, batching.packing, batching.seq_len)
    if pack.left_out and not pack.num_rows:
      raise UserError(
        f"data.seq_len={batching.seq_len} is too short for the {split} split of {str(name)!r}: "
        "nothing that is learned of its documents fits; raise data.seq_len"
      )
    order = _order(pack.num_rows, batching.seed if batching.shuffle else None, number)
    sources.append(Source(name, opened, pack, order))
    num_cut += cut
  mix = mixture.Mixture(
    len(sources),
    weights or [s.pack.num_rows for s in sources],
    [((rows_before or batching.batch_size.__mul__)(step), w) for step, w in weight_changes],
    batching.seed,
  )
  predicts_all = layouts.LAYOUTS[layout].predicts_text
  return Batches(sources, mix, batching.batch_size, made, predicts_all, num_cut, digest)


def _names(found: Sequence[epath.PathLike]) -> list[str]:
  """The folders' last names if they differ, else their paths."""
  short = [pathlib.PurePath(f).name for f in found]
  return short if len(set(short)) == len(short) else [os.fspath(f) for f in found]


def _order(num_rows: int, seed: int | None, number: int) -> Any:
  """The endless sequence of a source's epochs, each a permutation of its rows."""
  order = grain.MapDataset.range(num_rows)
  if seed is not None:
    # Grain seeds epoch e with seed + e, so neighbouring seeds would share their epochs.
    mixed = np.random.SeedSequence(seed % 2**64, spawn_key=(number,) if number else ())
    order = order.shuffle(seed=int(mixed.generate_state(1)[0]))
  return order.repeat()


class Batches(batch_source.FunctionOfStep):
  """Batches of prepared data by step number, as a `BatchSource`.

  A batch is a dict of the layout's arrays. Row i of step N has position N * B + i in an
  endless sequence of rows, in which the sources take turns by weight and each runs through its own
  epochs. Host h of H gets the rows h * B / H to (h + 1) * B / H of each step. Picklable.

  Attributes:
    sources: The prepared folders.
    layout: The row layout. See `layouts`.
    batch_size: Rows of a global batch (B).
    seq_len: Length of a row (T).
    len_rows: Rows of all sources.
    steps_per_epoch: ceil(len_rows / B).
    bytes: UTF-8 bytes of the texts, the denominator of bits per byte.
    predictions: Predictions of all sources.
    digest: Digest of the manifest, or of the manifests of all folders of `data.path`, including
      those without the split.
    predicts_all: An epoch predicts each token once, so that bits per byte are defined.
    num_documents: Documents of all sources.
    num_cut: Documents whose end was cut off to fit into a row.
  """

  def __init__(
    self,
    sources: list[Source],
    mix: mixture.Mixture,
    batch_size: int,
    layout: layouts.Layout,
    predicts_all: bool,
    num_cut: int,
    digest: str,
  ):
    """Use `make`."""
    self._predicts_all = predicts_all
    self._first_step = self._first_row = 0
    self._annotations: dict[str, Sequence[np.ndarray]] = {}
    self.sources, self._mixture, self.batch_size = sources, mix, batch_size
    self.layout, self.num_cut, self.digest = layout, num_cut, digest
    self.seq_len = sources[0].pack.seq_len
    self._ends = np.cumsum([s.pack.num_rows for s in sources])
    self.len_rows = int(self._ends[-1])
    self.steps_per_epoch = -(-self.len_rows // batch_size)
    self.num_documents = sum(s.split.num_documents for s in sources)
    self.bytes = sum(s.split.bytes for s in sources)
    self.predictions = sum(int(s.split.lengths.sum()) for s in sources)
    self.predicts_all = predicts_all and all(s.split.kind == "text" for s in sources)

  def by_source(self) -> dict[str, "Batches"]:
    """Splits a mixture into one `Batches` per source, by name."""
    alone = mixture.Mixture(1, [1])
    return {
      s.name: Batches(
        [s], alone, self.batch_size, self.layout, self._predicts_all, 0, s.split.digest
      ).annotated({name: [arrays[i]] for name, arrays in self._annotations.items()})
      for i, s in enumerate(self.sources)
    }

  def annotated(self, arrays: Mapping[str, Sequence[np.ndarray]]) -> "Batches":
    """The same batches with further arrays, whose rows belong to the rows of the sources.

    Args:
      arrays: {name: for each source an array [rows of its pack index, …]}.
    """
    out = copy.copy(self)
    out._annotations = {**self._annotations, **arrays}
    return out

  def starting(self, step: int, row: int, batch_size: int) -> "Batches":
    """The same rows in batches of another size, of which the one at `step` begins with row `row`.

    Args:
      step: A step.
      row: A global index of a row.
      batch_size: Rows of a global batch.
    """
    out = copy.copy(self)
    out._first_step, out._first_row, out.batch_size = step, row, batch_size
    out.steps_per_epoch = -(-out.len_rows // batch_size)
    return out

  def host_checks(self) -> list[HostCheck]:
    """See `BatchSource`. `digest` covers all of the data."""
    return []

  def describe(self, host_count: int = 1) -> list[str]:
    """See `BatchSource`: documents that were cut off, and targets that fill more than a row."""
    del host_count
    lines = []
    if self.num_cut:
      lines.append(
        f"{self.num_cut:,} of {self.num_documents:,} documents are longer than data.seq_len="
        f"{self.seq_len} and lose an end"
      )
    if self.layout.predicts_tokens and (count := self._num_long_targets()):
      lines.append(
        f"{count:,} of {self.num_documents:,} documents have a target longer than data.seq_len="
        f"{self.seq_len}; it continues in rows that do not see its beginning"
      )
    if left_out := sum(s.pack.left_out for s in self.sources):
      lines.append(
        f"{left_out:,} of {self.num_documents:,} documents are left out: what is learned of them, "
        f"or of the other answer, begins after data.seq_len={self.seq_len} tokens"
      )
    return lines

  def _num_long_targets(self) -> int:
    """Documents with a run of trained tokens that is longer than a row, of kinds with such runs."""
    count = 0
    for s in self.sources:
      if s.split.kind in ("chat", "seq2seq"):
        for doc in np.flatnonzero(s.split.lengths > self.seq_len).tolist():
          runs = s.split.trained(doc)
          count += runs is not None and bool((runs[:, 1] - runs[:, 0] > self.seq_len).any())
    return count

  def summary(self) -> str:
    """See `BatchSource`: the steps of an epoch."""
    return f"shards have their sizes; an epoch has {self.steps_per_epoch:,} steps"

  def check_labels(self, num_labels: int) -> None:
    """Checks that a model with `num_labels` outputs fits the labels of the data.

    Raises:
      UserError: It does not fit.
    """
    names = self.sources[0].split.label_names
    if names and not 1 < num_labels >= len(names):
      raise UserError(
        f"model.num_labels={num_labels}, but the data has {len(names)} classes "
        f"({label_numbers.listed(names)}): set model.num_labels={max(len(names), 2)}"
      )
    if not names and num_labels != 1:
      raise UserError(
        f"model.num_labels={num_labels}, but the labels of the data are numbers, "
        "not classes: set model.num_labels=1 for a regression, or make them classes with "
        "jaxgpt data --labels=A,B,C"
      )

  def rows(self, step: int, host_index: int = 0, host_count: int = 1) -> list[Row]:
    """Traces the B / host_count rows that a host gets at a step.

    `pack.spans` and `split.source_name` of a row's source name the documents in it.

    Raises:
      UserError: host_count does not divide the batch size.
      IndexError: The step or the host does not exist.
    """
    low, high = self._host_rows(host_index, host_count)
    if step < 0:
      raise IndexError(f"step {step} is negative")
    first = self._position(step) + low
    chosen, numbers = self._mixture.locate(first, high - low)
    out = []
    for i, (number, n) in enumerate(zip(chosen.tolist(), numbers.tolist())):
      s = self.sources[number]
      out.append(Row(first + i, number, n // s.pack.num_rows, s.order[n]))
    return out

  def _position(self, step: int) -> int:
    """The global index of a step's first row."""
    return self._first_row + (step - self._first_step) * self.batch_size

  def check_hosts(self, host_index: int, host_count: int) -> None:
    """Checks that a batch splits evenly over the hosts.

    Raises:
      UserError, IndexError: See `rows`.
    """
    self._host_rows(host_index, host_count)

  def _host_rows(self, host_index: int, host_count: int) -> tuple[int, int]:
    """The range of a host's rows in each batch."""
    if host_count < 1 or self.batch_size % host_count:
      raise UserError(
        f"data.batch_size={self.batch_size} does not split evenly over {host_count} "
        "hosts; choose a multiple"
      )
    if not 0 <= host_index < host_count:
      raise IndexError(f"host {host_index} of {host_count}")
    per_host = self.batch_size // host_count
    return host_index * per_host, (host_index + 1) * per_host

  def epochs(self, step: int) -> dict[str, float]:
    """Passes over each source before a step: {name: epochs}, with fractions."""
    counts = self._mixture.counts(self._position(step))
    return {s.name: n / s.pack.num_rows for s, n in zip(self.sources, counts)}

  def batch(self, step: int, host_index: int = 0, host_count: int = 1) -> Batch:
    """Makes a host's rows of the batch at a step: a dict of arrays [B / host_count, T].

    Raises:
      UserError, IndexError: See `rows`.
    """
    rows = self.rows(step, host_index, host_count)
    return self._assemble([(r.source, r.row, r.position) for r in rows], len(rows))

  def blank(self, num_rows: int) -> Batch:
    """See `BatchSource`."""
    return self._assemble([], num_rows)

  def iterate(
    self,
    start_step: int = 0,
    *,
    stop_step: int | None = None,
    host_index: int = 0,
    host_count: int = 1,
    threads: int = 4,
    prefetch: int = 4,
  ) -> BatchIterator:
    """Iterates over `batch(start_step)`, `batch(start_step + 1)`, …, made ahead of time.

    Args:
      start_step: The first step.
      stop_step: The step to stop before, or None to never stop.
      host_index: See `batch`.
      host_count: See `batch`.
      threads: Threads that make batches. 0 makes them on demand.
      prefetch: Batches to keep ready. 0 makes them on demand.

    Returns:
      A Grain iterator. Its `close()` ends the threads.

    Raises:
      UserError, IndexError: See `rows`.
    """
    self._host_rows(host_index, host_count)
    steps = grain.MapDataset.range(start_step, sys.maxsize if stop_step is None else stop_step)
    batches = steps.map(lambda step: self.batch(step, host_index, host_count))
    return batch_source.prefetched(batches, threads, prefetch)

  def epoch_batches(
    self, *, host_index: int = 0, host_count: int = 1, threads: int = 4, prefetch: int = 4
  ) -> BatchIterator:
    """Iterates over all rows of all sources once, in the documents' order: for evaluation.

    The last batch is filled up with rows of zero weight, so that all batches have one shape and
    all hosts the same number of them. The weighted loss, summed over all batches and divided by
    `bytes * ln 2`, is bits per byte.

    Args:
      host_index: See `batch`.
      host_count: See `batch`.
      threads: See `iterate`.
      prefetch: See `iterate`.

    Raises:
      UserError, IndexError: See `rows`.
    """
    low, high = self._host_rows(host_index, host_count)

    def batch(step):
      return self._assemble(self._epoch_rows(step, low, high), high - low)

    batches = grain.MapDataset.range(self.steps_per_epoch).map(batch)
    return batch_source.prefetched(batches, threads, prefetch)

  def epoch_rows(self, step: int) -> list[tuple[int, int]]:
    """(index of the source, row in its pack index) of the rows of a batch of `epoch_batches`."""
    return [(source, row) for source, row, _ in self._epoch_rows(step, 0, self.batch_size)]

  def _epoch_rows(self, step: int, low: int, high: int) -> list[tuple[int, int, int]]:
    first = step * self.batch_size
    numbers = np.arange(min(first + low, self.len_rows), min(first + high, self.len_rows))
    chosen = np.searchsorted(self._ends, numbers, side="right")
    begins = np.concatenate(([0], self._ends))
    return list(zip(chosen.tolist(), (numbers - begins[chosen]).tolist(), numbers.tolist()))

  def laid_out(self, layout: layouts.Layout) -> "Batches":
    """The same documents in the rows of another layout, for evaluation."""
    sources = []
    for number, s in enumerate(self.sources):
      pack, _ = layout.index(s.split, "best_fit", self.seq_len)
      sources.append(s._replace(pack=pack, order=_order(pack.num_rows, 0, number)))
    mix = mixture.Mixture(len(sources), [s.pack.num_rows for s in sources])
    return Batches(sources, mix, self.batch_size, layout, self._predicts_all, 0, self.digest)

  def _assemble(self, rows: Sequence[tuple[int, int, int]], num_rows: int) -> Batch:
    """The batch of some rows (source, row, position), filled up to `num_rows`."""
    items = [
      layouts.Item(self.sources[s].split, self.sources[s].pack, row, position)
      for s, row, position in rows
    ]
    out = self.layout.batch(items, num_rows, self.seq_len)
    for name, arrays in self._annotations.items():
      out[name] = np.zeros((num_rows, *arrays[0].shape[1:]), arrays[0].dtype)
      for i, (s, row, _) in enumerate(rows):
        out[name][i] = arrays[s][row]
    return out


def digest_of(digests: Sequence[str]) -> str:
  """The digest that identifies a run's data: the manifest's, or one over those of all sources."""
  if len(digests) == 1:
    return digests[0]
  return hashlib.sha256("\n".join(digests).encode()).hexdigest()
