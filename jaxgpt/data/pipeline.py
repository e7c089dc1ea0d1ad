"""Batches of a prepared split: the batch at step N is a function of (data, config, seed, N).

Suffixes: B rows of a batch, T places in a row.
"""

import sys

import grain
import numpy as np

from jaxgpt.data import packing as packings
from jaxgpt.data import source
from jaxgpt.errors import UserError


def make(folder, split, *, seq_len, batch_size, packing="best_fit", seed=0, shuffle=True):
  """Opens a split and packs it.

  Args:
    folder: what `jaxgpt data` wrote.
    split: 'train', 'validation' or 'test'.
    seq_len: predictions a row has room for (T).
    batch_size: rows a step over all hosts (global B). It may exceed the rows of the split: epochs
      then follow each other within a batch.
    packing: best_fit, concat or one_per_row (see `packing`).
    seed: of the order of the rows; any integer.
    shuffle: permute the rows anew each epoch; else they come in the documents' order.

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
  opened = source.open_split(folder, split)
  pack = packings.PACKINGS[packing](opened.lengths, seq_len)
  return Batches(opened, pack, batch_size, seed if shuffle else None)


class Batches:
  """Batches by step number.

  A batch is a dict of arrays [B, T]:
    tokens, targets: int32, a token and the one after it; pad_id = 0 in padding.
    loss_weights: float32, 1 for a prediction and 0 for padding.
    segment_ids: int32, 1, 2, … for the spans of a row in their order; 0 for padding.
    positions: int32, from 0 in each span; 0 for padding.

  Row i of step N is number N * B + i in the endless sequence of epochs, each a permutation of all
  rows. Host h of H gets the rows h * B / H to (h + 1) * B / H of each step. Picklable.

  Attributes:
    split: the `source.Split`.
    pack: the `packing.PackIndex`.
    batch_size: global B.
    len_rows: rows of the split, R.
    steps_per_epoch: ceil(R / B), steps after which each row was seen.
  """

  def __init__(self, split, pack, batch_size, seed):
    """Use `make`. A seed of None leaves the rows in order."""
    self.split, self.pack, self.batch_size = split, pack, batch_size
    self.len_rows = pack.num_rows
    self.steps_per_epoch = -(-self.len_rows // batch_size)
    order = grain.MapDataset.range(self.len_rows)
    if seed is not None:
      # Grain seeds epoch e with seed + e, so neighbouring seeds would share their epochs.
      order = order.shuffle(seed=int(np.random.SeedSequence(seed % 2**64).generate_state(1)[0]))
    self._order = order.repeat()

  def rows(self, step, host_index=0, host_count=1):
    """Numbers in `pack` of the rows that a host gets at a step, a list of B / host_count.

    With `pack.spans` and `split.source_name` they tell which documents were in a step.

    Raises:
      UserError: host_count does not divide the batch size.
      IndexError: no such step or host.
    """
    low, high = self._host_rows(host_index, host_count)
    if step < 0:
      raise IndexError(f"step {step} is negative")
    first = step * self.batch_size
    return [self._order[first + i] for i in range(low, high)]

  def _host_rows(self, host_index, host_count):
    if host_count < 1 or self.batch_size % host_count:
      raise UserError(f"data.batch_size={self.batch_size} does not split evenly over {host_count} "
                      "hosts; choose a multiple")
    if not 0 <= host_index < host_count:
      raise IndexError(f"host {host_index} of {host_count}")
    per_host = self.batch_size // host_count
    return host_index * per_host, (host_index + 1) * per_host

  def batch(self, step, host_index=0, host_count=1):
    """A host's part of the batch at a step: a dict of arrays [B / host_count, T].

    Raises: as `rows`.
    """
    return self._assemble(self.rows(step, host_index, host_count))

  def iterate(self, start_step=0, *, stop_step=None, host_index=0, host_count=1, threads=4,
              prefetch=4):
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
    """Iterates over all rows once, in the documents' order: for evaluation.

    The last batch is filled up with rows of zero weight, so all have one shape and all hosts the
    same number. Over all of them the loss, summed with its weights and divided by
    `split.bytes * ln 2`, is bits per byte.

    Args:
      host_index, host_count, threads, prefetch: as in `iterate`.

    Raises: as `rows`.
    """
    low, high = self._host_rows(host_index, host_count)

    def batch(step):
      first = step * self.batch_size
      rows = range(min(first + low, self.len_rows), min(first + high, self.len_rows))
      return self._assemble(list(rows), high - low)

    batches = grain.MapDataset.range(self.steps_per_epoch).map(batch)
    return self._prefetched(batches, threads, prefetch)

  def _assemble(self, rows, num_rows=None):
    """The batch of some rows of the pack index, filled up to `num_rows` with padding."""
    pack = self.pack
    shape = (num_rows or len(rows), pack.seq_len)
    out = {key: np.zeros(shape, np.float32 if key == "loss_weights" else np.int32)
           for key in ("tokens", "targets", "loss_weights", "segment_ids", "positions")}
    bounds = [(int(pack.row_offsets[r]), int(pack.row_offsets[r + 1])) for r in rows]
    spans = np.concatenate([np.arange(a, b) for a, b in bounds] or [np.arange(0)])
    lengths = pack.length[spans]
    stored = iter(self.split.read_many(pack.doc[spans], pack.start[spans],
                                       lengths.astype(np.int64) + 1))
    places = np.arange(pack.seq_len, dtype=np.int32)
    for i, (first, last) in enumerate(bounds):
      tokens_T, targets_T, segment_ids_T, positions_T = (
          out[key][i] for key in ("tokens", "targets", "segment_ids", "positions"))
      at = 0
      for segment in range(1, last - first + 1):
        ids = next(stored)
        end = at + len(ids) - 1
        tokens_T[at:end] = ids[:-1]
        targets_T[at:end] = ids[1:]
        segment_ids_T[at:end] = segment
        positions_T[at:end] = places[:end - at]
        at = end
      out["loss_weights"][i, :at] = 1
    return out
