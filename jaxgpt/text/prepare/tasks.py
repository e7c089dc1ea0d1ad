"""What the stages of a preparation do, task by task; `prepare` says in which order.

Each function ends in (rank, folder, progress), as `stages.Stage` wants it, writes into the folder,
and returns its account. `stores` are the folders of cleaned documents, by rank.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import pickle

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.storage import malloc
from jaxgpt.text.filters import clean, decontaminate, dedup
from jaxgpt.text.prepare import document_store, shards
from jaxgpt.text.readers import documents as documents_lib
from jaxgpt.text.readers import formats
from jaxgpt.text.tokenizers import chat_template, examples
from jaxgpt.text.tokenizers import tokenizer as tokenizers

HELD_OUT = "held-out"  # in the place of a path to decontaminate from: this corpus's other splits
_BATCH_CHARS = 250_000  # characters tokenized in one call: more takes memory and saves no time
_BATCH_DOCUMENTS = 4_096
_FEW_DOCUMENTS = 100
_CUT_INTO = 400  # documents that few are cut into: enough for 5 % of them to be a fair sample
_LEAST_CUT = 1_000  # characters: less has no context to learn from; but
_LEAST_PARTS = 40  # so many parts there are to be, of 100 characters if need be
_MOST_TASKS = 512
_MOST_LABELS = 100_000


def list_inputs(files, task_bytes, rank, folder, progress):
  """Files to groups of about `task_bytes`, at most 512 of them, in the order given."""
  del rank, progress
  total = sum(file.size or 0 for file in files)
  count = min(max(total // task_bytes, 1), _MOST_TASKS)
  groups, start = {}, 0
  for file in files:
    # In quarters, so that groups differ by a quarter at most where a file can be cut.
    cut = count > 1 and file.size is not None
    for part in formats.split([file], -(-total // (4 * count))) if cut else [file]:
      groups.setdefault(min(start * count // max(total, 1), count - 1), []).append(part)
      start += part.size or 0
  for number, group in enumerate(groups.values()):
    (folder / f"{number:05d}").write_bytes(pickle.dumps(group))
  return {"tasks": len(groups)}


def read_and_clean(inputs, options, cut_chars, rank, folder, progress):
  """Files to cleaned documents. Parts of a document that is cut count as one document each."""
  dropped = SizedDropped(options.examples)
  documents = documents_lib.documents(
    pickle.loads((inputs / f"{rank:05d}").read_bytes()),
    kind=options.kind,
    fields=dict(options.fields),
    form=options.format,
    max_bytes=options.max_record_bytes,
    max_errors=options.max_errors,
    dropped=dropped,
  )
  cleaner = clean.make(options.clean)
  labels = {}
  with document_store.Writer(folder, options.salt) as writer:
    for document in cleaner(dropped.watch(documents), dropped):
      for number, part in enumerate(_cut(document, cut_chars)):
        dropped.read += number > 0
        progress(1, writer.add(part))
      if options.kind == "classification":
        _note_label(labels, document)
  return {
    "dropped": dropped.to_json(),
    "dropped_bytes": dropped.bytes,
    "changed": cleaner.changed,
    "labels": list(labels),
  }


class SizedDropped(documents_lib.Dropped):
  """An account that knows the UTF-8 bytes of what is dropped, where there is a document at all."""

  def __init__(self, limit):
    super().__init__(limit)
    self.bytes = {}
    self.at_hand = 0  # bytes of the document that is being looked at

  def add(self, rule, where, why, count=1):
    super().add(rule, where, why, count)
    self.bytes[rule] = self.bytes.get(rule, 0) + self.at_hand

  def watch(self, documents):
    for document in documents:
      self.at_hand = len(document.text.encode())
      yield document
      self.at_hand = 0


def cut_chars(files, options, report):
  """The length to cut at: the one given, or, where the corpus has too few documents to fill the
  splits, one that cuts them into enough; 0: don't."""
  if options.cut_chars is not None or not options.validation + options.test:
    return options.cut_chars or 0
  if options.kind != "text":
    return 0
  documents = documents_lib.documents(
    files, fields=dict(options.fields), form=options.format, max_bytes=options.max_record_bytes
  )
  lengths = [len(d.text) for d in itertools.islice(documents, _FEW_DOCUMENTS)]
  if len(lengths) == _FEW_DOCUMENTS:
    return 0
  total = sum(lengths)
  size = max(total // _CUT_INTO, min(_LEAST_CUT, total // _LEAST_PARTS), 100)
  if any(length > size for length in lengths):
    report(
      f"few documents ({len(lengths)}): they are cut after about {size:,} characters, so that "
      "there is something to hold out (--cut-chars=0: don't)"
    )
  return size


def _cut(document, chars):
  if not chars or len(document.text) <= chars:
    return [document]
  return [
    document._replace(source=f"{document.source}#{number}", text=text)
    for number, text in enumerate(documents_lib.chunks(document.text, chars), 1)
  ]


def _note_label(labels, document):
  """Keeps each class's label once; one float stands for all, which are no classes."""
  label = document.fields["label"]
  labels.setdefault(0.5 if isinstance(label, float) else label)
  if len(labels) > _MOST_LABELS:
    raise UserError(
      f"more than {_MOST_LABELS:,} different labels, such as {label!r} in "
      f"{document.source}; name the column of the labels with --field label=COLUMN"
    )


def sign(stores, config, rank, folder, progress):
  """First stage of `dedup`."""
  return {
    "documents": dedup.signatures(
      _watched(document_store.Store(stores[rank]), progress), rank, folder, config
    )
  }


def fill_buckets(signed, config, rank, folder, progress):
  """Second stage of `dedup`."""
  del progress
  dedup.buckets(rank, signed, folder, config)
  return {}


def cluster(signed, pairs, config, rank, folder, progress):
  """Third stage of `dedup`."""
  del rank, progress
  return dedup.cluster(signed, pairs, folder, config)


def _watched(documents, progress):
  for document in documents:
    progress(1, len(document.text))
    yield document


def collect_held_out(stores, clusters, sources, options, config, rank, folder, progress):
  """First stage of `decontaminate`: a task's held-out documents, or one of the files given.

  Args:
    sources: lists of files, each the rank len(stores), len(stores) + 1, …
  """
  if rank < len(stores):
    documents = document_store.Store(stores[rank])
    split_of = document_store.splits_of(documents.index, options.validation, options.test)
    stay = ~gone(clusters, None, rank, len(documents))
    accounts = {}
    for number, split in enumerate(shards.SPLITS[1:], 1):
      (folder / split).mkdir()
      chosen = documents.take(np.flatnonzero((split_of == number) & stay))
      accounts[split] = decontaminate.collect(_watched(chosen, progress), folder / split, config)
    return accounts
  listed = documents_lib.documents(
    sources[rank - len(stores)], fields={"text": options.decontaminate_field}
  )
  return decontaminate.collect(_watched(listed, progress), folder, config)


def index_held_out(inputs, config, rank, folder, progress):
  """Second stage of `decontaminate`."""
  del rank, progress
  return decontaminate.merge(inputs, folder, config)


def find_contaminated(stores, clusters, index, options, config, rank, folder, progress):
  """Training documents that hold runs of words of held-out ones, in a file {number: why}."""
  documents = document_store.Store(stores[rank])
  split_of = document_store.splits_of(documents.index, options.validation, options.test)
  numbers = np.flatnonzero((split_of == 0) & ~gone(clusters, None, rank, len(documents)))
  filter_ = decontaminate.Filter(index, config)
  found = {}
  for number, document in zip(numbers.tolist(), _watched(documents.take(numbers), progress)):
    if why := filter_.check(document.text):
      found[number] = why
  (folder / "found.json").write_text(json.dumps(found if config.remove else {}), encoding="utf-8")
  return {"found": filter_.found, "documents": len(found)}


def removed(clusters, contaminated, rank):
  """{number: (rule, why)} of a task's documents that go; of duplicates, why is the rank and number
  of the document that stays.

  Args:
    clusters: folder of `cluster`, or None.
    contaminated: folders of `find_contaminated` by rank, or None.
  """
  out = {}
  if clusters is not None:
    for number, rule, first_rank, first in dedup.removals(rank, clusters).tolist():
      out[number] = dedup.RULES[rule], (first_rank, first)
  if contaminated is not None:
    found = json.loads((contaminated[rank] / "found.json").read_text(encoding="utf-8"))
    out.update((int(number), (decontaminate.RULE, why)) for number, why in found.items())
  return out


def gone(clusters, contaminated, rank, count):
  """bool [count]: which of a task's documents go."""
  mask = np.zeros(count, bool)
  mask[list(removed(clusters, contaminated, rank))] = True
  return mask


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Cleaned documents and what is known of them: what the last stages read."""

  stores: list
  clusters: pathlib.Path | None
  contaminated: list | None

  def removed(self, rank):
    return removed(self.clusters, self.contaminated, rank)


def make_tokenizer(corpus, options, rank, folder, progress):
  """The tokenizer, trained on a sample where it is to be trained."""
  del rank, progress
  tokenizer = tokenizers.from_spec(
    options.tokenizer,
    lambda: sample(corpus, options),
    sample_bytes=options.sample_bytes,
    symbols=options.symbols,
  )
  tokenizer.save(folder / "tokenizer")
  malloc.trim()  # this process waits for others from now on, and one is forked from it
  return {"digest": tokenizer.digest}


def sample(corpus, options):
  """Texts of the training split, about `sample_bytes` of them, drawn by their hashes.

  Those with the lowest hashes are taken: an even sample, which the order of the files does not
  change.
  """
  best = np.empty((0, 4), np.uint64)  # key, task, number, bytes
  for task, folder in enumerate(corpus.stores):
    index = document_store.Store(folder).index
    mask = document_store.splits_of(index, options.validation, options.test) == 0
    mask[list(corpus.removed(task))] = False
    number = np.flatnonzero(mask)
    rows = np.stack(
      [
        index["key"][number],
        np.full(len(number), task, np.uint64),
        number.astype(np.uint64),
        np.minimum(index["bytes"][number], options.sample_bytes),
      ],
      axis=1,
    )
    best = np.concatenate((best, rows))
    best = best[np.lexsort((best[:, 2], best[:, 1], best[:, 0]))]
    best = best[: np.searchsorted(np.cumsum(best[:, 3]), options.sample_bytes) + 1]
  if not len(best):
    raise nothing_to_train_on(options)
  texts = {}
  for task in np.unique(best[:, 1]).tolist():
    numbers = np.sort(best[best[:, 1] == task, 2].astype(np.int64))
    documents = document_store.Store(corpus.stores[task]).take(numbers)
    for number, document in zip(numbers.tolist(), documents):
      texts[task, number] = document.text[: options.sample_bytes]
  return [texts[task, number] for task, number in best[:, 1:3].tolist()]


def nothing_to_train_on(options):
  return UserError(
    "no document for the training split: either none has any text (the rules and counts are "
    f"reported), or all went to validation={options.validation} and test={options.test}; lower "
    "these shares, give more documents (a line of a .jsonl file is one), cut long ones with "
    "cut_chars, or set another salt"
  )


@functools.lru_cache(maxsize=1)
def _load_tokenizer(saved):
  """A process loads it once, with the words that it has met."""
  return tokenizers.load(saved)


def tokenize(corpus, saved, label_names, options, rank, folder, progress):
  """Cleaned documents to shards of each split."""
  tokenizer = _load_tokenizer(saved)
  template = (
    chat_template.load(options.template, tokenizer)
    if options.kind in ("chat", "preference")
    else None
  )
  dropped, sources, templated = SizedDropped(options.examples), {}, False
  writers = {
    split: shards.SplitWriter(folder, split, tokenizer, options.shard_tokens, options.kind)
    for split in shards.SPLITS
  }
  encoded = 0
  try:
    for batch in _batches(_kept(corpus, rank, options, dropped)):
      stored = examples.encode_batch(
        [document for _, _, document in batch], options.kind, tokenizer, template, label_names
      )
      for (split, num_bytes, document), parts in zip(batch, stored):
        if isinstance(parts, UserError):
          dropped.at_hand = num_bytes
          dropped.add("chat template", document.source, str(parts))
          continue
        encoded += 1
        templated |= examples.is_chat(document, options.kind)
        count = sources.setdefault(_source_group(document.source), [0, 0])
        count[0], count[1] = count[0] + 1, count[1] + num_bytes
        sizes = [num_bytes] if len(parts) == 1 else _answer_bytes(document)
        for part, size in zip(parts, sizes):
          writers[shards.SPLITS[split]].add(part, size, document.source)
      progress(len(batch), sum(num_bytes for _, num_bytes, _ in batch))
  finally:
    for writer in writers.values():
      writer.close()
  return {
    "splits": {split: writer.finish() for split, writer in writers.items()},
    "dropped": dropped.to_json(),
    "dropped_bytes": dropped.bytes,
    "encoded": encoded,
    "sources": sources,
    "template": template.name if templated else None,
  }


def _kept(corpus, rank, options, dropped):
  """(split, UTF-8 bytes, document) of the documents that stay."""
  documents, goes = document_store.Store(corpus.stores[rank]), corpus.removed(rank)
  splits = document_store.splits_of(documents.index, options.validation, options.test)
  sizes = documents.index["bytes"]
  for number, document in enumerate(documents):
    if number in goes:
      rule, why = goes[number]
      dropped.at_hand = int(sizes[number])
      if isinstance(why, tuple):  # finding its name takes a while, and only examples need it
        is_example = dropped.counts.get(rule, 0) < dropped.limit
        why = f"like {_source_of(corpus.stores, *why)}" if is_example else ""
      dropped.add(rule, document.source, why)
    else:
      yield int(splits[number]), int(sizes[number]), document


def _source_of(stores, rank, number):
  return next(document_store.Store(stores[rank]).take([number])).source


def _source_group(source):
  """'corpus/….jsonl' of 'corpus/a/b.jsonl:7': what the card adds up."""
  path, _, number = source.partition("#")[0].rpartition(":")
  path = pathlib.PurePosixPath(path if number.isdecimal() else source.partition("#")[0])
  return f"{path.parts[0]}/…{path.suffix}" if len(path.parts) > 1 else str(path)


def _answer_bytes(document):
  """UTF-8 bytes of the two texts of a preference: the prompt with each of its answers."""
  if examples.is_chat(document, "preference"):
    return [
      sum(len(message["content"].encode()) for message in messages)
      for messages in examples.conversations(document.fields)
    ]
  prompt = len(document.fields.get("prompt", "").encode())
  return [prompt + len(document.fields[name].encode()) for name in ("chosen", "rejected")]


def _batches(items):
  batch, chars = [], 0
  for item in items:
    batch.append(item)
    chars += len(item[2].text)
    if chars >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
      yield batch
      batch, chars = [], 0
  if batch:
    yield batch
