"""Duplicates: which documents of a corpus to remove, exact and near ones.

Stages over tasks, so that a corpus of any size is gone through in separate processes and from where
it stopped. A task is a group of inputs; its documents are numbered from 0, and the corpus is the
tasks in order of their ranks.

  signatures   once a task        documents -> digests, MinHash signatures
  buckets      once a bucket      signatures of all tasks -> candidate pairs
  cluster      once               pairs -> the documents to remove, by task
  removals     whenever           what `cluster` found for a task

A stage writes into an empty folder that the caller makes (and renames, once it is whole), and reads
the folders of the stages before it. What is removed depends on the documents and their order, not
on how they are cut into tasks. Memory is that of one task's signatures; `cluster` holds 16 bytes a
document, and the signatures of suspects in a file.

Signatures, their files and the merge that finds pairs are datatrove's. It would remove all of a
connected group but any one of its documents, and would take two documents that share a bucket by
chance for duplicates. Here, the FIRST document of a group stays, and one is removed only where
enough of its hashes agree with those of a document that stays.
"""

import collections
import dataclasses
import hashlib
import itertools
import pathlib

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.text.filters import clean, step_specs, words

RULES = ("duplicate", "near duplicate")  # as dropped documents are counted

_SPECS = {
  "exact": {"ignore_space": True, "ignore_case": False},
  # A document with 5 % of its words changed shares 0.95^3 / (2 - 0.95^3) = 0.75 of its 3-grams,
  # but only 0.63 of datatrove's 5-grams, of which its 14 buckets of 8 hashes find 30 %. 20
  # buckets of 6 hashes find 0.75 with probability 1 - (1 - 0.75^6)^20 = 98 %; but 0.5 with 27 %
  # too, which is why pairs are compared in all 120 hashes (standard error 0.04) before a
  # document is removed. tests/benchmarks/dedup.py measures both.
  "near": {"ngram": 3, "buckets": 20, "hashes": 6, "threshold": 0.65, "seed": 1},
}
_DIGESTS = "digests.npy"
_TABLE = "table.npy"
_PART = 1 << 24  # digests that are sorted at once
_SHINGLES = 1 << 13  # n-grams that are hashed at once
_ROWS = 1 << 16  # signatures that are compared at once


@dataclasses.dataclass(frozen=True)
class Config:
  """What `make` returns. `exact` and `near` are dicts of options, or None: not asked for."""

  exact: dict | None
  near: dict | None


def make(given):
  """Reads the specs of `--dedup`.

  Args:
    given: strings: 'exact', 'near', each perhaps with options, as in
      'exact:ignore_case=true' or 'near:ngram=3,buckets=20,hashes=6,threshold=0.65'.
      ignore_space: differences in white space don't count (nor does white space at the ends).
      threshold: share of n-grams in common (Jaccard) from which on documents are near duplicates.

  Returns:
    A `Config`, which pickles.

  Raises:
    UserError: a bad spec, or the extra that 'near' needs is missing.
  """
  options = dict(step_specs.parse(spec, "--dedup", _SPECS) for spec in given)
  near = options.get("near")
  if near is not None:
    for key in ("ngram", "buckets", "hashes"):
      if near[key] < 1:
        raise UserError(f"--dedup=near: {key}={near[key]} must be at least 1")
    if not 0 < near["threshold"] <= 1:
      raise UserError(f"--dedup=near: threshold={near['threshold']} must be in (0, 1]")
    clean.datatrove("pipeline.dedup.minhash")
  return Config(options.get("exact"), near)


def signatures(documents, rank, out, config):
  """Stage 1, for one task: what the other stages need to know of its documents.

  Args:
    documents: an iterable of `read.Document`, or of anything with a `text`.
    rank: the task's number; ranks are 0, 1, … without a gap.
    out: an empty folder.
    config: a `Config`.

  Returns:
    The number of documents.
  """
  digests = bytearray()

  def watched():
    for document in documents:
      digests.extend(_digest(document.text, config.exact))
      yield document

  if config.near is None:
    collections.deque(watched(), maxlen=0)
  else:
    _signature_block(out, config.near).run(watched(), rank)
  found = np.frombuffer(bytes(digests), "<u8").reshape(-1, 2)
  np.save(pathlib.Path(out, _DIGESTS), found)
  return len(found)


def bucket_tasks(config):
  """How many times `buckets` is to be run, with ranks 0, 1, …; 0 without near duplicates."""
  return config.near["buckets"] if config.near else 0


def buckets(rank, inputs, out, config):
  """Stage 2, for one bucket, once stage 1 is done for all tasks: pairs that may be duplicates.

  Args:
    rank: the bucket's number.
    inputs: the folders of stage 1, by rank.
    out: an empty folder.
    config: a `Config`.
  """
  block = clean.datatrove("pipeline.dedup.minhash").MinhashDedupBuckets(
    str(out), str(out), config=_minhash_config(config.near), lines_to_buffer=1000
  )
  block.input_folder = _SignatureFiles(inputs, rank)
  block.run(None, rank, config.near["buckets"])


def cluster(inputs, pairs, out, config):
  """Stage 3, once stages 1 and 2 are done: decides what to remove, for all tasks.

  Args:
    inputs: the folders of stage 1, by rank.
    pairs: the folders of stage 2, by rank.
    out: an empty folder.
    config: a `Config`.

  Returns:
    {rule: documents to remove}, with the `RULES` as keys.
  """
  digests = [np.load(pathlib.Path(folder, _DIGESTS), mmap_mode="r") for folder in inputs]
  starts = np.cumsum([0] + [len(d) for d in digests])  # of each task, in the corpus
  none = np.zeros((0, 2), np.int64)
  exact = _exact(digests, starts) if config.exact is not None else none
  near = _near(inputs, pairs, out, starts, exact, config.near) if config.near else none
  rows = np.concatenate(
    [
      np.column_stack((found, np.full(len(found), rule)))
      for rule, found in enumerate((exact, near))
    ]
  )
  rows = rows[np.argsort(rows[:, 0])]  # document, the first one like it, rule
  for rank in range(len(inputs)):
    own = rows[slice(*np.searchsorted(rows[:, 0], starts[rank : rank + 2]))]
    first_rank = np.searchsorted(starts, own[:, 1], side="right") - 1
    own = np.column_stack(
      (own[:, 0] - starts[rank], own[:, 2], first_rank, own[:, 1] - starts[first_rank])
    )
    np.save(pathlib.Path(out, f"{rank:05d}.npy"), own.astype(np.int64))
  return dict(zip(RULES, (len(exact), len(near))))


def removals(rank, folder):
  """What `cluster` found for a task, in its folder.

  Returns:
    int64 [R, 4], sorted: the document's number in its task, its rule as an index of `RULES`, and
    the rank and number of the document that it is like and that stays, but for 'duplicate', where
    that one may be a near duplicate of another.
  """
  return np.load(pathlib.Path(folder, f"{rank:05d}.npy"))


def kept(documents, rank, folder, dropped):
  """The documents of a task that stay, in order.

  Args:
    documents: those that `signatures` saw, in the same order.
    rank, folder: as before.
    dropped: a `read.Dropped` that counts the others under their rule.
  """
  out = {number: rest for number, *rest in removals(rank, folder).tolist()}
  for number, document in enumerate(documents):
    if number in out:
      rule, first_rank, first = out[number]
      dropped.add(
        RULES[rule], document.source, f"like document {first} of input group {first_rank}"
      )
    else:
      yield document


class _SignatureFiles:
  """One bucket's files of all tasks, as much of a datatrove folder as its merge asks for."""

  def __init__(self, inputs, bucket):
    self._files = [_signature_file(folder, bucket, rank) for rank, folder in enumerate(inputs)]

  def list_files(self, **_):
    return self._files

  def open(self, file, mode, **_):
    return clean.datatrove("io").open_file(str(file), mode)

  def open_files(self, files, mode, **_):
    return [self.open(file, mode) for file in files]


def _signature_file(folder, bucket, rank):
  return pathlib.Path(folder, f"bucket_{bucket:03d}", f"{rank:05d}.minhash.sig")


def _digest(text, options):
  if options is None:
    return bytes(16)
  if options["ignore_case"]:
    text = text.lower()
  if options["ignore_space"]:
    text = " ".join(text.split())
  return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _minhash_config(near):
  return clean.datatrove("pipeline.dedup.minhash").MinhashConfig(
    n_grams=near["ngram"],
    num_buckets=near["buckets"],
    hashes_per_bucket=near["hashes"],
    seed=near["seed"],
    hash_config=clean.datatrove("utils.hashing").HashConfig(precision=32),
  )


def _signature_block(folder, near):
  """datatrove's first stage, on our words and in flat memory."""

  class Signature(clean.datatrove("pipeline.dedup.minhash").MinhashDedupSignature):
    def get_shingles(self, text):
      hashes = words.ngram_hashes(text, self.config.n_grams)
      return np.unique(hashes).reshape(-1, 1)

    def get_signature(self, shingles):
      parts = [
        super(Signature, self).get_signature(shingles[i : i + _SHINGLES])
        for i in range(0, len(shingles), _SHINGLES)
      ]
      return np.min(np.array(parts, np.uint32), axis=0).tolist()

  return Signature(str(folder), config=_minhash_config(near), language=clean.word_tokenizer())


def _exact(digests, starts):
  """int64 [R, 2]: documents that equal an earlier one, and the first of these; sorted."""
  parts = -(-int(starts[-1]) // _PART)
  found = []
  for part in range(parts):
    chosen = [np.flatnonzero(d[:, 0] % np.uint64(parts) == part) for d in digests]
    where = np.concatenate([c + start for c, start in zip(chosen, starts)])
    high, low = (np.concatenate([d[c, k] for c, d in zip(chosen, digests)]) for k in (0, 1))
    order = np.lexsort((where, low, high))
    high, low, where = high[order], low[order], where[order]
    same = np.zeros(len(where), bool)
    same[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    first = where[np.maximum.accumulate(np.where(same, 0, np.arange(len(where))))]
    found.append(np.column_stack((where[same], first[same])))
  rows = np.concatenate(found) if found else np.zeros((0, 2), np.int64)
  return rows[np.argsort(rows[:, 0])]


def _near(inputs, folders, out, starts, exact, near):
  """int64 [R, 2]: documents that are near duplicates of one that stays, and that one."""
  pairs = np.zeros((0, 2), np.int64)
  for bucket, folder in enumerate(folders):
    raw = np.fromfile(pathlib.Path(folder, f"{bucket:05d}_00.dups"), "<u4").reshape(-1, 2, 2)
    more = starts[raw[:, :, 0]] + raw[:, :, 1]
    if len(exact):  # an exact duplicate stands for the first of its kind
      at = np.minimum(np.searchsorted(exact[:, 0], more), len(exact) - 1)
      more = np.where(exact[at, 0] == more, exact[at, 1], more)
    more = more[more[:, 0] != more[:, 1]]
    pairs = np.unique(np.concatenate((pairs, np.sort(more, axis=1))), axis=0)
  if not len(pairs):
    return pairs
  nodes, ends = np.unique(pairs, return_inverse=True)
  group = _components(len(nodes), *ends.reshape(-1, 2).T)
  order = np.lexsort((nodes, group))  # the documents of a group side by side, the first one first
  nodes, group = nodes[order], group[order]
  table = _signatures_of(nodes, inputs, pathlib.Path(out, _TABLE), starts, near)
  bounds = np.flatnonzero(np.diff(group, prepend=-1, append=-1))
  found = [
    like_first
    for start, end in itertools.pairwise(bounds)
    for like_first in _greedy(nodes[start:end], table[start:end], near["threshold"])
  ]
  pathlib.Path(out, _TABLE).unlink()
  return np.array(found, np.int64).reshape(-1, 2)


def _components(count, u, v):
  """The least node that each of `count` nodes is connected with, over the edges (u, v)."""
  parent = np.arange(count)
  while True:
    a, b = parent[u], parent[v]
    apart = a != b
    if not apart.any():
      return parent
    np.minimum.at(parent, np.maximum(a, b)[apart], np.minimum(a, b)[apart])
    while (up := parent[parent]).tobytes() != parent.tobytes():
      parent = up


def _signatures_of(nodes, inputs, path, starts, near):
  """The signatures of some documents, uint32 [nodes, buckets * hashes], in a file."""
  size = near["hashes"]
  table = np.lib.format.open_memmap(path, "w+", np.uint32, (len(nodes), near["buckets"] * size))
  record = np.dtype([("hashes", "<u4", (size,)), ("document", "<u4")])
  ranks = np.searchsorted(starts, nodes, side="right") - 1
  for rank in np.unique(ranks):
    rows = np.flatnonzero(ranks == rank)
    numbers = nodes[rows] - starts[rank]
    for bucket in range(near["buckets"]):
      records = np.fromfile(_signature_file(inputs[rank], bucket, rank), record)
      by_number = np.argsort(records["document"])
      at = by_number[np.searchsorted(records["document"], numbers, sorter=by_number)]
      table[rows, bucket * size : (bucket + 1) * size] = records["hashes"][at]
  return table


def _greedy(nodes, table, threshold):
  """(document, the earlier one that stays and is like it), for the documents of one group."""
  left = np.arange(len(nodes))
  while len(left) > 1:
    first, left = left[0], left[1:]
    like = np.concatenate(
      [
        (table[left[i : i + _ROWS]] == table[first]).mean(axis=1) >= threshold
        for i in range(0, len(left), _ROWS)
      ]
    )
    yield from ((nodes[i], nodes[first]) for i in left[like])
    left = left[~like]
