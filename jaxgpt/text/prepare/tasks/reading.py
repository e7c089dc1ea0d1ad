"""Tasks that read files: dividing the inputs, and reading and cleaning documents."""

import dataclasses
import itertools
import pathlib
import pickle
from collections.abc import Iterable, Iterator, Sequence

from jaxgpt.storage.files import File
from jaxgpt.text.filters import clean
from jaxgpt.text.prepare import document_store, splits
from jaxgpt.text.prepare.jobs import Account, Counter, Report
from jaxgpt.text.prepare.options import Options
from jaxgpt.text.readers import documents as documents_lib
from jaxgpt.text.readers import formats
from jaxgpt.text.readers.documents import Document
from jaxgpt.text.tokenizers import labels as labels_lib

_FEW_DOCUMENTS = 100
_CUT_INTO = 400  # pieces to cut few documents into: 5 % of them are a fair sample
_LEAST_CUT = 1_000  # characters of a piece: a shorter one has no context to learn from, but
_LEAST_PIECES = 40  # a short text makes at least 40 pieces, of 100 characters if need be
_MOST_TASKS = 512


def list_inputs(
  files: splits.Inputs,
  task_bytes: int,
  rank: int,
  folder: pathlib.Path,
  progress: Counter,
  encoding: str | None = None,
  form: str | None = None,
) -> Account:
  """Divides files into groups of about `task_bytes` in the order given, about 512 at most.

  A group has files of one split. Those of held-out splits come first, as in `splits.ORDER`.
  """
  del rank, progress
  total = sum(file.size or 0 for group in files.values() for file in group)
  task_bytes = max(task_bytes, total // _MOST_TASKS)
  task_splits: list[str] = []
  for split in splits.ORDER:
    for group in _divided(files.get(split, ()), task_bytes, encoding, form):
      (folder / f"{len(task_splits):05d}").write_bytes(pickle.dumps(group))
      task_splits.append(split)
  return {"splits": task_splits}


def _divided(
  files: Sequence[File], task_bytes: int, encoding: str | None, form: str | None
) -> list[list[File]]:
  total = sum(file.size or 0 for file in files)
  count = min(max(total // task_bytes, 1), _MOST_TASKS)
  groups: dict[int, list[File]] = {}
  start = 0
  for file in files:
    # Large files are cut into quarters of a group, so that groups differ by a quarter at most.
    cut, size = count > 1 and file.size is not None, -(-total // (4 * count))
    for piece in formats.split([file], size, encoding, form) if cut else [file]:
      groups.setdefault(min(start * count // max(total, 1), count - 1), []).append(piece)
      start += piece.size or 0
  return list(groups.values())


def read_and_clean(
  inputs: pathlib.Path,
  options: Options,
  cut_chars: int,
  task_splits: Sequence[str],
  rank: int,
  folder: pathlib.Path,
  progress: Counter,
) -> Account:
  """Turns files into cleaned documents.

  Pieces of a document that is cut count as one document each.

  Args:
    inputs: Folder of `list_inputs`.
    options: The options of the preparation.
    cut_chars: Characters after which documents are cut. 0: never.
    task_splits: The split of each task, or `splits.BY_HASH`.
    rank, folder, progress: As in `jobs.RunTask`.
  """
  dropped = SizedDropped(options.examples)
  documents = documents_lib.documents(
    pickle.loads((inputs / f"{rank:05d}").read_bytes()),
    kind=options.kind,
    fields=dict(options.fields),
    form=options.format,
    max_bytes=options.max_record_bytes,
    max_errors=options.max_errors,
    encoding=options.encoding,
    delimiter=options.delimiter,
    dropped=dropped,
    group=options.split_by if task_splits[rank] == splits.BY_HASH else "",
  )
  cleaner = clean.make(options.clean)
  labels = labels_lib.Seen()
  # A fraction is a class only where the user says so, or where there are no numbers.
  listed = bool(options.labels) or options.kind != "classification"
  with document_store.Writer(folder, options.salt, task_splits[rank]) as writer:
    for document in cleaner(dropped.watch(documents), dropped):
      if not cut_chars or len(document.text) <= cut_chars:
        progress(1, writer.add(document))
      else:
        for number, piece in enumerate(_cut(document, cut_chars)):
          dropped.read += number > 0
          progress(1, writer.add(piece))
      for label in labels_lib.of(document.fields, options.kind):
        labels.add(label, document.source, listed)
  return {
    "dropped": dropped.to_json(),
    "dropped_bytes": dropped.bytes,
    "changed": cleaner.changed,
    "labels": dataclasses.asdict(labels),
  }


class SizedDropped(documents_lib.Dropped):
  """An account of dropped documents that also sums up their bytes.

  Attributes:
    bytes: {rule: UTF-8 bytes of the dropped texts}, of documents that could be read.
    at_hand: The document that is being looked at: its bytes, or its text.
  """

  def __init__(self, limit: int):
    super().__init__(limit)
    self.bytes: dict[str, int] = {}
    self.at_hand: int | str = 0

  def add(self, rule: str, where: str, why: str, count: int = 1) -> None:
    """Counts dropped documents. See `documents.Dropped.add`."""
    super().add(rule, where, why, count)
    size = self.at_hand if isinstance(self.at_hand, int) else len(self.at_hand.encode())
    self.bytes[rule] = self.bytes.get(rule, 0) + size

  def watch(self, documents: Iterable[Document]) -> Iterator[Document]:
    """Yields the documents and notes the size of the current one."""
    for document in documents:
      self.at_hand = document.text
      yield document
      self.at_hand = 0


def cut_chars(files: Sequence[File], options: Options, report: Report) -> int:
  """The length in characters at which documents are cut, or 0 for never.

  It is the one given, or, if the corpus has too few documents to fill the splits, one that cuts
  them into enough pieces.
  """
  if options.cut_chars is not None or not sum(options.shares):
    return options.cut_chars or 0
  if options.kind != "text" or options.split_by:
    return 0
  documents = documents_lib.documents(
    files,
    fields=dict(options.fields),
    form=options.format,
    max_bytes=options.max_record_bytes,
    encoding=options.encoding,
    delimiter=options.delimiter,
  )
  lengths = [len(d.text) for d in itertools.islice(documents, _FEW_DOCUMENTS)]
  if len(lengths) == _FEW_DOCUMENTS:
    return 0
  total = sum(lengths)
  size = max(total // _CUT_INTO, min(_LEAST_CUT, total // _LEAST_PIECES), 100)
  if any(length > size for length in lengths):
    report(
      f"few documents ({len(lengths)}): they are cut after about {size:,} characters, so that "
      "there is something to hold out (--cut-chars=0: never cut)"
    )
  return size


def _cut(document: Document, chars: int) -> list[Document]:
  return [
    document._replace(source=f"{document.source}#{number}", text=text)
    for number, text in enumerate(documents_lib.chunks(document.text, chars), 1)
  ]
