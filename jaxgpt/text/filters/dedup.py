"""Deduplication: finds the documents of a corpus to remove, exact and near duplicates.

The work is divided into phases over tasks, so that a corpus of any size is processed by separate
processes and resumed where it stopped. A task is a group of inputs. Its documents are numbered from
0. The corpus is the concatenation of the tasks by rank.

  signatures   per task            documents -> digests, MinHash signatures
  buckets      per bucket          signatures of all tasks -> candidate pairs
  cluster      once                pairs -> documents to remove, by task
  removals     any time            the result of `cluster` for one task

Each phase writes into an empty folder that the caller creates (and renames when complete). It reads
the folders of the phases before it. The result depends on the documents and their order, not on
their division into tasks. Memory is that of one task's signatures. `cluster` needs 16 bytes per
document, 24 if documents have labels, and keeps the signatures of candidates in a file.

MinHash in short: of all n-grams of a text, keep the smallest hash under each of 120 hash functions.
Two texts agree in each of these 120 numbers with a probability equal to the share of n-grams that
they have in common (Jaccard similarity). Comparing all pairs of texts is too slow, so the numbers
are grouped into 20 buckets of 6:

  text A   [ 3 1 4 1 5 9 | 2 6 5 3 5 8 | 9 7 9 3 2 3 | ... ]
  text B   [ 3 1 7 1 5 9 | 2 6 5 3 5 8 | 9 7 0 3 2 3 | ... ]
                           ^^^^^^^^^^^ equal bucket: a candidate pair

Sorting each bucket finds the candidates. They are then compared in all 120 numbers.

The signatures, their files and the merge that finds candidates are datatrove's. datatrove would
keep an arbitrary document of each connected group, and remove a document that shares a bucket by
chance. Here the FIRST document of a group stays, and another is removed only if enough of its
hashes agree with those of a document that stays.
"""

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxgpt.config.registry import Registry
from jaxgpt.errors import UserError
from jaxgpt.text.filters import datatrove_blocks, exact_duplicates, step_specs, words
from jaxgpt.text.filters.step_specs import Option
from jaxgpt.text.readers import fields as fields_lib
from jaxgpt.text.readers.documents import Document, Dropped

RULES = ("duplicate", "near duplicate")  # names in the account of dropped documents


class DedupKind(NamedTuple):
  """A kind of duplicates.

  Attributes:
    options: The options that users may set.
    summary: One line for the documentation.
  """

  options: Mapping[str, Option]
  summary: str


KINDS: Registry[DedupKind] = Registry("--dedup")
KINDS.add(
  "exact",
  DedupKind(
    {
      "ignore_space": Option(True, "treat any white space as one space, and none at the ends"),
      "ignore_case": Option(False, "compare in lower case"),
    },
    "drop texts that equal an earlier one with the same label",
  ),
)
KINDS.add(
  "near",
  # A document with 5% of its words changed shares 0.95^3 / (2 - 0.95^3) = 0.75 of its 3-grams with
  # the original, but only 0.63 of its 5-grams (datatrove's default, whose 14 buckets of 8 hashes
  # find 30% of such pairs). 20 buckets of 6 hashes find similarity 0.75 with probability
  # 1 - (1 - 0.75^6)^20 = 98%. They also find 0.5 with 27%, so pairs are compared in all 120 hashes
  # (standard error 0.04) before a document is removed. tests/benchmarks/dedup.py measures both.
  DedupKind(
    {
      "ngram": Option(3, "words of an n-gram"),
      "buckets": Option(20, "buckets of hashes; more find more candidates"),
      "hashes": Option(6, "hashes of a bucket; more find fewer candidates"),
      "threshold": Option(0.65, "smallest share of common n-grams (Jaccard similarity)"),
      "seed": Option(1, "seed of the hash functions"),
    },
    "drop texts that share most of their n-grams with an earlier one with the same label (MinHash)",
  ),
)
_DIGESTS = "digests.npy"
_TABLE = "table.npy"
_SHINGLES = 1 << 13  # n-grams to hash at once
_COMPARED = 1 << 16  # signatures to compare at once


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of deduplication.

  Attributes:
    exact: Options of exact duplicates, or None if they are not requested.
    near: The same of near duplicates.
    by_fields: Documents have fields. Their texts are compared one by one, each with the field of
      the same name, and equal texts with different labels are no duplicates.
  """

  exact: dict[str, Any] | None
  near: dict[str, Any] | None
  by_fields: bool = False

  def depends(self) -> dict[str, Any]:
    """The part of the configuration that the results depend on, as plain JSON."""
    found = {"exact": self.exact, "near": self.near}
    # 2: with the names of fields. Unfinished work without them is done again.
    return found | ({"by_fields": 2} if self.by_fields else {})


def make(given: Iterable[str], by_fields: bool = False) -> Config:
  """Parses the specs of `--dedup`.

  Args:
    given: Names of `KINDS`, each with optional settings, as in 'exact:ignore_case=true' or
      'near:ngram=3,buckets=20,hashes=6,threshold=0.65'.
    by_fields: See `Config`.

  Returns:
    The configuration, which pickles.

  Raises:
    UserError: A bad spec, or the extra that 'near' needs is missing.
  """
  options = dict(
    step_specs.parse(spec, KINDS.setting, step_specs.defaults(KINDS)) for spec in given
  )
  near = options.get("near")
  if near is not None:
    for key in ("ngram", "buckets", "hashes"):
      if near[key] < 1:
        raise UserError(f"--dedup=near: {key}={near[key]} must be at least 1")
    if not 0 < near["threshold"] <= 1:
      raise UserError(f"--dedup=near: threshold={near['threshold']} must be in (0, 1]")
    if not 0 <= near["seed"] < 1 << 32:
      raise UserError(f"--dedup=near: seed={near['seed']} must be at least 0 and below 2**32")
    datatrove_blocks.module("pipeline.dedup.minhash")
  return Config(options.get("exact"), near, by_fields)


def signatures(
  documents: Iterable[Document], rank: int, out: epath.PathLike, config: Config
) -> int:
  """Phase 1, for one task: digests and signatures of its documents.

  Args:
    documents: The documents. Only `text` is used, and with `Config.by_fields` also `fields`.
    rank: The task's number. Ranks are 0, 1, … without a gap.
    out: An empty folder.
    config: The options.

  Returns:
    The number of documents.
  """
  digests = bytearray()

  def watched() -> Iterator[_Whole]:
    for document in documents:
      digests.extend(exact_duplicates.digest(document, config.exact, config.by_fields))
      yield _Whole(document)

  if config.near is None:
    collections.deque(watched(), maxlen=0)
  else:
    _signature_block(out, config.near, config.by_fields).run(watched(), rank)
  found = np.frombuffer(bytes(digests), "<u8").reshape(-1, 3 if config.by_fields else 2)
  np.save(pathlib.Path(out, _DIGESTS), found)
  return len(found)


def bucket_tasks(config: Config) -> int:
  """Number of `buckets` tasks, with ranks 0, 1, … It is 0 without near duplicates."""
  return config.near["buckets"] if config.near else 0


def buckets(
  rank: int, inputs: Sequence[epath.PathLike], out: epath.PathLike, config: Config
) -> None:
  """Phase 2, for one bucket, after phase 1 of all tasks: candidate pairs.

  Args:
    rank: The bucket's number.
    inputs: The folders of phase 1, by rank.
    out: An empty folder.
    config: The options. `near` must be set.
  """
  assert config.near is not None
  block = datatrove_blocks.module("pipeline.dedup.minhash").MinhashDedupBuckets(
    str(out), str(out), config=_minhash_config(config.near), lines_to_buffer=1000
  )
  block.input_folder = _SignatureFiles(inputs, rank)
  block.run(None, rank, config.near["buckets"])


class Clusters(NamedTuple):
  """The outcome of `cluster`.

  Attributes:
    removed: {rule: documents to remove}, with the `RULES` as keys.
    conflicts: Texts with more than one label.
    example: Two documents with one of these texts, each as (rank, number), or ().
  """

  removed: dict[str, int]
  conflicts: int
  example: tuple[tuple[int, int], ...]


def cluster(
  inputs: Sequence[epath.PathLike],
  pairs: Sequence[epath.PathLike],
  out: epath.PathLike,
  config: Config,
) -> Clusters:
  """Phase 3, after phases 1 and 2: decides which documents to remove, for all tasks.

  Args:
    inputs: The folders of phase 1, by rank.
    pairs: The folders of phase 2, by rank.
    out: An empty folder.
    config: The options.

  Returns:
    `Clusters`.
  """
  digests = [np.load(pathlib.Path(folder, _DIGESTS), mmap_mode="r") for folder in inputs]
  starts = np.cumsum([0] + [len(d) for d in digests])  # first document of each task in the corpus
  none = np.zeros((0, 2), np.int64)
  equal = exact_duplicates.Found(none, 0, [])
  if config.exact is not None:
    equal = exact_duplicates.find(digests, starts)
  exact = equal.duplicates
  labels = np.concatenate([d[:, 2] for d in digests]) if config.by_fields else None
  near = _near(inputs, pairs, out, starts, exact, config.near, labels) if config.near else none
  removed = np.concatenate(
    [
      np.column_stack((found, np.full(len(found), rule)))
      for rule, found in enumerate((exact, near))
    ]
  )
  removed = removed[np.argsort(removed[:, 0])]  # columns: document, the first one like it, rule
  for rank in range(len(inputs)):
    own = removed[slice(*np.searchsorted(removed[:, 0], starts[rank : rank + 2]))]
    first_rank = np.searchsorted(starts, own[:, 1], side="right") - 1
    own = np.column_stack(
      (own[:, 0] - starts[rank], own[:, 2], first_rank, own[:, 1] - starts[first_rank])
    )
    np.save(pathlib.Path(out, f"{rank:05d}.npy"), own.astype(np.int64))
  ranks = np.searchsorted(starts, equal.example, side="right") - 1
  where = tuple((int(r), int(d - starts[r])) for r, d in zip(ranks, equal.example))
  return Clusters(dict(zip(RULES, (len(exact), len(near)))), equal.conflicts, where)


def removals(rank: int, folder: epath.PathLike) -> np.ndarray:
  """Reads the result of `cluster` for a task.

  Args:
    rank: The task's number.
    folder: The folder of `cluster`.

  Returns:
    int64 [R, 4], sorted: the document's number in its task, its rule as an index of `RULES`, and
    the rank and number of the document that it duplicates. That document stays, except that the
    original of an exact duplicate may itself be a near duplicate of another.
  """
  return np.load(pathlib.Path(folder, f"{rank:05d}.npy"))


def kept(
  documents: Iterable[Document], rank: int, folder: epath.PathLike, dropped: Dropped
) -> Iterator[Document]:
  """Yields the documents of a task that stay, in order.

  Args:
    documents: The documents that `signatures` saw, in the same order.
    rank: The task's number.
    folder: The folder of `cluster`.
    dropped: The account that counts the others under their rule.
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
  """One bucket's files of all tasks: the part of a datatrove folder that its merge uses."""

  def __init__(self, inputs: Sequence[epath.PathLike], bucket: int):
    self._files = [_signature_file(folder, bucket, rank) for rank, folder in enumerate(inputs)]

  def list_files(self, **_: Any) -> list[pathlib.Path]:
    return self._files

  def open(self, file: pathlib.Path, mode: str, **_: Any) -> Any:
    return datatrove_blocks.module("io").open_file(str(file), mode)

  def open_files(self, files: Iterable[pathlib.Path], mode: str, **_: Any) -> list[Any]:
    return [self.open(file, mode) for file in files]


def _signature_file(folder: epath.PathLike, bucket: int, rank: int) -> pathlib.Path:
  return pathlib.Path(folder, f"bucket_{bucket:03d}", f"{rank:05d}.minhash.sig")


def _minhash_config(near: Mapping[str, Any]) -> Any:
  return datatrove_blocks.module("pipeline.dedup.minhash").MinhashConfig(
    n_grams=near["ngram"],
    num_buckets=near["buckets"],
    hashes_per_bucket=near["hashes"],
    seed=near["seed"],
    hash_config=datatrove_blocks.module("utils.hashing").HashConfig(precision=32),
  )


class _Whole(NamedTuple):
  """The document for datatrove's signature block, which looks at nothing but its `text`."""

  text: Document


def _ngrams(document: Document, n: int, by_fields: bool) -> np.ndarray:
  """Hashes of the n-grams of a document: uint64 [n-grams].

  With `by_fields`, an n-gram belongs to its field: a sentence and its translation are not like the
  same two in the other direction. A field of fewer than n words is one n-gram. A document of fewer
  than n words has none.
  """
  if not by_fields:
    return words.ngram_hashes(document.text, n)
  found, count = [np.zeros(0, np.uint64)], 0
  for name, value in document.fields.items():
    text = "\n".join(fields_lib.texts(name, value))
    hashes, size = words.ngram_hashes(text, n), n
    if not len(hashes) and (size := len(words.plain_words(text))):
      hashes = words.ngram_hashes(text, size)
    found.append(hashes ^ np.uint64(words.word_hash(name)))
    count += size
  return np.concatenate(found if count >= n else found[:1])


def _signature_block(folder: epath.PathLike, near: Mapping[str, Any], by_fields: bool) -> Any:
  """datatrove's signature block, on our words and in bounded memory."""

  base: Any = datatrove_blocks.module("pipeline.dedup.minhash").MinhashDedupSignature

  class Signature(base):
    def get_shingles(self, document: Document) -> np.ndarray:
      return np.unique(_ngrams(document, self.config.n_grams, by_fields)).reshape(-1, 1)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
      # The minimum over all shingles is the minimum of the minima of slices of them.
      minima = [
        super(Signature, self).get_signature(shingles[i : i + _SHINGLES])
        for i in range(0, len(shingles), _SHINGLES)
      ]
      return np.min(np.array(minima, np.uint32), axis=0).tolist()

  return Signature(
    str(folder), config=_minhash_config(near), language=datatrove_blocks.word_tokenizer()
  )


def _near(
  inputs: Sequence[epath.PathLike],
  folders: Sequence[epath.PathLike],
  out: epath.PathLike,
  starts: np.ndarray,
  exact: np.ndarray,
  near: Mapping[str, Any],
  labels: np.ndarray | None,
) -> np.ndarray:
  """Finds near duplicates.

  Args:
    inputs, folders, out, starts: As in `cluster`.
    exact: From `_exact`.
    near: The options.
    labels: For each document a number of its label, or None.

  Returns:
    int64 [R, 2]: a document that is a near duplicate of one that stays, and the latter.
  """
  pairs = np.zeros((0, 2), np.int64)
  for bucket, folder in enumerate(folders):
    raw = np.fromfile(pathlib.Path(folder, f"{bucket:05d}_00.dups"), "<u4").reshape(-1, 2, 2)
    more = starts[raw[:, :, 0]] + raw[:, :, 1]
    if len(exact):  # the first copy stands for its exact duplicates
      at = np.minimum(np.searchsorted(exact[:, 0], more), len(exact) - 1)
      more = np.where(exact[at, 0] == more, exact[at, 1], more)
    more = more[more[:, 0] != more[:, 1]]
    pairs = np.unique(np.concatenate((pairs, np.sort(more, axis=1))), axis=0)
  if not len(pairs):
    return pairs
  nodes, ends = np.unique(pairs, return_inverse=True)
  group = _components(len(nodes), *ends.reshape(-1, 2).T)
  if labels is not None:
    # Like texts with different labels are no duplicates. A group is divided by label only here: a
    # bucket pairs neighbours, so two texts of one label may be connected by one of another.
    label = np.unique(labels[nodes], return_inverse=True)[1]
    group = group * (label.max() + 1) + label
  order = np.lexsort((nodes, group))  # groups contiguous, each in document order
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


def _components(count: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """The smallest node in the connected component of each of `count` nodes, for edges (u, v).

  Every node points to a smaller or equal one. Each round points the larger of the two roots of an
  edge at the smaller one, then shortens all paths to length 1.
  """
  parent = np.arange(count)
  while True:
    a, b = parent[u], parent[v]
    apart = a != b
    if not apart.any():
      return parent
    np.minimum.at(parent, np.maximum(a, b)[apart], np.minimum(a, b)[apart])
    while (up := parent[parent]).tobytes() != parent.tobytes():
      parent = up


def _signatures_of(
  nodes: np.ndarray,
  inputs: Sequence[epath.PathLike],
  path: pathlib.Path,
  starts: np.ndarray,
  near: Mapping[str, Any],
) -> np.ndarray:
  """The signatures of some documents in a memory-mapped file: uint32 [nodes, buckets * hashes]."""
  size = near["hashes"]
  table = np.lib.format.open_memmap(path, "w+", np.uint32, (len(nodes), near["buckets"] * size))
  record = np.dtype([("hashes", "<u4", (size,)), ("document", "<u4")])
  ranks = np.searchsorted(starts, nodes, side="right") - 1
  for rank in np.unique(ranks):
    here = np.flatnonzero(ranks == rank)
    numbers = nodes[here] - starts[rank]
    for bucket in range(near["buckets"]):
      records = np.fromfile(_signature_file(inputs[rank], bucket, rank), record)
      by_number = np.argsort(records["document"])
      at = by_number[np.searchsorted(records["document"], numbers, sorter=by_number)]
      table[here, bucket * size : (bucket + 1) * size] = records["hashes"][at]
  return table


def _greedy(
  nodes: np.ndarray, table: np.ndarray, threshold: float
) -> Iterator[tuple[np.integer, np.integer]]:
  """Yields (document, the earlier one that stays and is like it) for the documents of one group.

  The first document left stays and removes all that are like it. This repeats with the rest.
  """
  left = np.arange(len(nodes))
  while len(left) > 1:
    first, left = left[0], left[1:]
    like = np.concatenate(
      [
        (table[left[i : i + _COMPARED]] == table[first]).mean(axis=1) >= threshold
        for i in range(0, len(left), _COMPARED)
      ]
    )
    yield from ((nodes[i], nodes[first]) for i in left[like])
    left = left[~like]
