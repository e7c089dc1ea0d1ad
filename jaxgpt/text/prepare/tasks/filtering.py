"""Tasks that find documents to remove: duplicates, and training documents that leak held-out text.

Nothing is deleted. These tasks write down the numbers of the documents that go, and `Corpus` hands
them to the tasks that come later.

    signatures    per store        sketch of each document                     (dedup)
    buckets       per hash range   pairs of documents with equal sketches      (dedup)
    duplicates    one task         clusters; all but one of each go            (dedup)
    held-out      per store/file   runs of words of held-out documents         (decontaminate)
    index         one task         all of these in one sorted table            (decontaminate)
    contaminated  per store        training documents that share such a run    (decontaminate)
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.storage import strict_json
from jaxgpt.storage.files import File
from jaxgpt.text.filters import decontaminate, dedup
from jaxgpt.text.prepare import document_store, shards, splits
from jaxgpt.text.prepare.jobs import Account, Counter, Report
from jaxgpt.text.prepare.options import Options
from jaxgpt.text.readers import documents as documents_lib
from jaxgpt.text.readers.documents import Document

HELD_OUT = "held-out"  # in place of a path to decontaminate from: this corpus's held-out splits


def sign(
  stores: Sequence[pathlib.Path],
  config: dedup.Config,
  rank: int,
  folder: pathlib.Path,
  progress: Counter,
) -> Account:
  """First job of `dedup`."""
  documents = _watched(document_store.Store(stores[rank]), progress)
  return {"documents": dedup.signatures(documents, rank, folder, config)}


def fill_buckets(
  signed: Sequence[pathlib.Path],
  config: dedup.Config,
  rank: int,
  folder: pathlib.Path,
  progress: Counter,
) -> Account:
  """Second job of `dedup`."""
  del progress
  dedup.buckets(rank, signed, folder, config)
  return {}


def cluster(
  signed: Sequence[pathlib.Path],
  pairs: Sequence[pathlib.Path],
  config: dedup.Config,
  rank: int,
  folder: pathlib.Path,
  progress: Counter,
) -> Account:
  """Third job of `dedup`."""
  del rank, progress
  return dedup.cluster(signed, pairs, folder, config)._asdict()


def _watched(documents: Iterable[Document], progress: Counter) -> Iterator[Document]:
  for document in documents:
    progress(1, len(document.text))
    yield document


def collect_held_out(
  stores: Sequence[pathlib.Path],
  clusters: pathlib.Path | None,
  sources: Sequence[Sequence[File]],
  options: Options,
  config: decontaminate.Config,
  rank: int,
  folder: pathlib.Path,
  progress: Counter,
) -> Account:
  """First job of `decontaminate`: the held-out documents of a store, or of one of the files given.

  Args:
    stores: Stores of this corpus, if its held-out splits are among the texts to look for.
    clusters: Folder of `cluster`, or None.
    sources: Lists of files. Their ranks follow those of the stores.
    options, config: The options of the preparation and of `decontaminate`.
    rank, folder, progress: As in `jobs.RunTask`.
  """
  if rank < len(stores):
    documents = document_store.Store(stores[rank])
    split_of = documents.splits(options.shares)
    stay = ~gone(clusters, None, rank, len(documents))
    accounts = {}
    for number, split in enumerate(shards.SPLITS[1:], 1):
      (folder / split).mkdir()
      chosen = documents.take(np.flatnonzero((split_of == number) & stay))
      accounts[split] = decontaminate.collect(_watched(chosen, progress), folder / split, config)
    return accounts
  dropped = documents_lib.Dropped(options.examples)
  listed = _texts_of(sources[rank - len(stores)], options, dropped)
  account: Account = decontaminate.collect(_watched(listed, progress), folder, config)
  return account | {"dropped": dropped.to_json()}


def _texts_of(
  listed: Sequence[File], options: Options, dropped: documents_lib.Dropped
) -> Iterator[Document]:
  """The documents of the files given to `decontaminate`. Each file must have at least one."""
  for file in listed:
    own = documents_lib.Dropped(1)
    yield from documents_lib.documents(
      [file], fields={"text": options.decontaminate_field}, dropped=own
    )
    if not own.kept:
      reasons = [
        f"{count:,} dropped: {own.examples[rule][0]}" for rule, count in own.counts.items()
      ]
      raise UserError(
        f"decontaminate={file.source}: no text could be read from it "
        f"({'; '.join(reasons) or 'it is empty'}); name the column of the text with "
        "--decontaminate-field=COLUMN, or leave the file out"
      )
    dropped.merge(own.to_json())


def report(account: Account) -> list[str]:
  """Lines about what `collect_held_out` read from the files of one path."""
  dropped = documents_lib.Dropped()
  dropped.merge(account.get("dropped") or dropped.to_json())
  return [f"{account['documents']:,} documents to look for", *dropped.lines()]


def check_collected(
  accounts: Sequence[Account], own: int, config: decontaminate.Config, tell: Report
) -> None:
  """Reports held-out documents that can't be found, from the accounts of `collect_held_out`.

  Args:
    accounts: The accounts. The first `own` are of this corpus's held-out splits.
    own: Number of stores.
    config: The options of `decontaminate`.
    tell: Takes a line.

  Raises:
    UserError: The held-out splits have no document.
  """
  counts = [c for account in accounts[:own] for c in account.values()]
  if own and not any(c["documents"] for c in counts):
    raise UserError(
      f"decontaminate={HELD_OUT}: no document is held out; raise --validation or --test, or leave "
      "it out"
    )
  short = sum(c["too short"] for c in [*counts, *accounts[own:]])
  if short:
    tell(
      f"{short:,} held-out documents have fewer than {config.words} words, so they cannot be "
      "found: --decontaminate-options=words=… sets the number"
    )


def check_index(runs: Mapping[str, int], config: decontaminate.Config) -> None:
  """Checks that there is something to look for from each path.

  Args:
    runs: {path or split: runs of words in the index}.
    config: The options of `decontaminate`.

  Raises:
    UserError: A path has no run of words.
  """
  for name, count in runs.items():
    if not count and name not in shards.SPLITS:
      raise UserError(
        f"decontaminate={name}: nothing to look for: its texts have fewer than {config.words} "
        f"words, or share all of their runs with more than {config.common} others; set "
        "--decontaminate-options=words=N,common=N (common=0: all runs count)"
      )


def index_held_out(
  inputs: Mapping[str, Sequence[pathlib.Path]],
  config: decontaminate.Config,
  rank: int,
  folder: pathlib.Path,
  progress: Counter,
) -> Account:
  """Second job of `decontaminate`."""
  del rank, progress
  return decontaminate.merge(inputs, folder, config)


def find_contaminated(
  stores: Sequence[pathlib.Path],
  clusters: pathlib.Path | None,
  index: pathlib.Path,
  options: Options,
  config: decontaminate.Config,
  rank: int,
  folder: pathlib.Path,
  progress: Counter,
) -> Account:
  """Third job of `decontaminate`: writes {number: reason} of contaminated training documents."""
  documents = document_store.Store(stores[rank])
  split_of = documents.splits(options.shares)
  numbers = np.flatnonzero((split_of == 0) & ~gone(clusters, None, rank, len(documents)))
  filter_ = decontaminate.Filter(index, config)
  found = {}
  for number, document in zip(numbers.tolist(), _watched(documents.take(numbers), progress)):
    if why := filter_.check(document.text):
      found[number] = why
  (folder / "found.json").write_text(
    strict_json.dumps(found if config.remove else {}), encoding="utf-8"
  )
  return {"found": filter_.found, "documents": len(found)}


def removed(
  clusters: pathlib.Path | None, contaminated: Sequence[pathlib.Path] | None, rank: int
) -> dict[int, tuple[str, Any]]:
  """The documents of a store that go.

  Args:
    clusters: Folder of `cluster`, or None.
    contaminated: Folders of `find_contaminated` by rank, or None.
    rank: Rank of the store.

  Returns:
    {number: (rule, reason)}. For a duplicate the reason is the (rank, number) of the document that
    stays, otherwise it is text.
  """
  out: dict[int, tuple[str, Any]] = {}
  if clusters is not None:
    for number, rule, first_rank, first in dedup.removals(rank, clusters).tolist():
      out[number] = dedup.RULES[rule], (first_rank, first)
  if contaminated is not None:
    found = json.loads((contaminated[rank] / "found.json").read_text(encoding="utf-8"))
    out.update((int(number), (decontaminate.RULE, why)) for number, why in found.items())
  return out


def gone(
  clusters: pathlib.Path | None,
  contaminated: Sequence[pathlib.Path] | None,
  rank: int,
  count: int,
) -> np.ndarray:
  """bool [count]: True for each document of a store that goes."""
  mask = np.zeros(count, bool)
  mask[list(removed(clusters, contaminated, rank))] = True
  return mask


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Cleaned documents and the removals that were found, for the jobs that write tokens.

  Attributes:
    stores: Folders of cleaned documents by rank.
    clusters: Folder of `cluster`, or None.
    contaminated: Folders of `find_contaminated` by rank, or None.
  """

  stores: list[pathlib.Path]
  clusters: pathlib.Path | None
  contaminated: list[pathlib.Path] | None

  def removed(self, rank: int) -> dict[int, tuple[str, Any]]:
    """The documents of a store that go. See `removed`."""
    return removed(self.clusters, self.contaminated, rank)


def count_groups(stores: Sequence[pathlib.Path], shares: splits.Shares) -> list[int]:
  """The number of groups of `split_by` in each of `shards.SPLITS`.

  Documents of files that are a split of their own belong to no group.
  """
  keys = np.empty(0, np.uint64)
  for folder in stores:
    store = document_store.Store(folder)
    if not store.split:
      keys = np.union1d(keys, store.index["key"])
  index = np.zeros(len(keys), document_store.INDEX)
  index["key"] = keys
  return np.bincount(document_store.splits_of(index, shares), minlength=3).tolist()


def count_shared(corpus: Corpus, shares: splits.Shares) -> int:
  """The number of training documents whose text is also in a held-out split."""

  def digests(rank: int, held_out: bool) -> np.ndarray:
    store = document_store.Store(corpus.stores[rank])
    stay = ~gone(corpus.clusters, corpus.contaminated, rank, len(store))
    chosen = ((store.splits(shares) > 0) == held_out) & stay
    found = np.ascontiguousarray(store.index["digest"][chosen])
    return found.view([("a", "<u8"), ("b", "<u8")]).reshape(-1)

  ranks = range(len(corpus.stores))
  held_out = np.unique(np.concatenate([digests(rank, True) for rank in ranks]))
  return sum(int(np.isin(digests(rank, False), held_out).sum()) for rank in ranks)
