"""Tasks that make the tokenizer and write token shards."""

import functools
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.storage import malloc
from jaxgpt.text.prepare import document_store, shards
from jaxgpt.text.prepare.jobs import Account, Counter
from jaxgpt.text.prepare.options import Options
from jaxgpt.text.prepare.tasks.filtering import Corpus
from jaxgpt.text.prepare.tasks.reading import SizedDropped
from jaxgpt.text.readers.documents import Document
from jaxgpt.text.tokenizers import chat_template, examples
from jaxgpt.text.tokenizers import tokenizer as tokenizers

_BATCH_CHARS = 250_000  # characters tokenized in one call: more takes memory and saves no time
_BATCH_DOCUMENTS = 4_096

_Kept = tuple[int, int, Document]  # (number of the split, UTF-8 bytes, document)


def make_tokenizer(
  corpus: Corpus, options: Options, rank: int, folder: pathlib.Path, progress: Counter
) -> Account:
  """Loads or trains the tokenizer and saves it."""
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


def sample(corpus: Corpus, options: Options) -> list[str]:
  """Texts of the training split, about `sample_bytes` of them.

  Takes the documents with the lowest hashes: a uniform sample that does not depend on the order of
  the files.
  """
  best = np.empty((0, 4), np.uint64)  # hash, task, number, bytes
  for task, folder in enumerate(corpus.stores):
    index = document_store.Store(folder).index
    mask = document_store.splits_of(index, options.validation, options.test) == 0
    mask[list(corpus.removed(task))] = False
    number = np.flatnonzero(mask)
    found = np.stack(
      [
        index["key"][number],
        np.full(len(number), task, np.uint64),
        number.astype(np.uint64),
        np.minimum(index["bytes"][number], options.sample_bytes),
      ],
      axis=1,
    )
    best = np.concatenate((best, found))
    best = best[np.lexsort((best[:, 2], best[:, 1], best[:, 0]))]
    best = best[: np.searchsorted(np.cumsum(best[:, 3]), options.sample_bytes) + 1]
  if not len(best):
    raise nothing_to_train_on(options)
  texts = {}
  for task in np.unique(best[:, 1]).tolist():
    numbers = np.sort(best[best[:, 1] == task, 2].astype(np.int64))
    documents = document_store.Store(corpus.stores[task]).take(numbers)
    for n, document in zip(numbers.tolist(), documents):
      texts[task, n] = document.text[: options.sample_bytes]
  return [texts[task, n] for task, n in best[:, 1:3].tolist()]


def nothing_to_train_on(options: Options) -> UserError:
  """The error of a corpus that leaves the training split empty."""
  return UserError(
    "no document for the training split: either none has any text (the rules and counts are "
    f"reported), or all went to validation={options.validation} and test={options.test}; lower "
    "these shares, give more documents (a line of a .jsonl file is one), cut long ones with "
    "cut_chars, or set another salt"
  )


@functools.lru_cache(maxsize=1)
def _load_tokenizer(saved: pathlib.Path) -> tokenizers.Tokenizer:
  """Loads a tokenizer once per process, so that its cache of words lives on between tasks."""
  return tokenizers.load(saved)


def tokenize(
  corpus: Corpus,
  saved: pathlib.Path,
  label_names: Sequence[str],
  options: Options,
  rank: int,
  folder: pathlib.Path,
  progress: Counter,
) -> Account:
  """Turns cleaned documents into shards of each split.

  Args:
    corpus: The documents.
    saved: Folder of the tokenizer.
    label_names: Names of the classes, in order.
    options: The options of the preparation.
    rank, folder, progress: As in `jobs.RunTask`.
  """
  tokenizer = _load_tokenizer(saved)
  template = (
    chat_template.load(options.template, tokenizer)
    if options.kind in ("chat", "preference")
    else None
  )
  dropped, templated = SizedDropped(options.examples), False
  sources: dict[str, list[int]] = {}
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
      for (split, num_bytes, document), texts in zip(batch, stored):
        if isinstance(texts, UserError):
          dropped.at_hand = num_bytes
          dropped.add("chat template", document.source, str(texts))
          continue
        encoded += 1
        templated |= examples.is_chat(document, options.kind)
        count = sources.setdefault(_source_group(document.source), [0, 0])
        count[0], count[1] = count[0] + 1, count[1] + num_bytes
        sizes = [num_bytes] if len(texts) == 1 else _answer_bytes(document)
        for text, size in zip(texts, sizes):
          writers[shards.SPLITS[split]].add(text, size, document.source)
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
    "template": template.name if template and templated else None,
  }


def _kept(corpus: Corpus, rank: int, options: Options, dropped: SizedDropped) -> Iterator[_Kept]:
  """The documents that stay. The others are counted in `dropped`."""
  documents, goes = document_store.Store(corpus.stores[rank]), corpus.removed(rank)
  splits = document_store.splits_of(documents.index, options.validation, options.test)
  sizes = documents.index["bytes"]
  for number, document in enumerate(documents):
    if number in goes:
      rule, why = goes[number]
      dropped.at_hand = int(sizes[number])
      if isinstance(why, tuple):  # looking up its name takes a while, and only examples need it
        is_example = dropped.counts.get(rule, 0) < dropped.limit
        why = f"like {source_of(corpus.stores, *why)}" if is_example else ""
      dropped.add(rule, document.source, why)
    else:
      yield int(splits[number]), int(sizes[number]), document


def source_of(stores: Sequence[pathlib.Path], rank: int, number: int) -> str:
  """The name of a document, by its store and its number there."""
  return next(document_store.Store(stores[rank]).take([number])).source


def _source_group(source: str) -> str:
  """The group that the data card sums up: 'corpus/….jsonl' for 'corpus/a/b.jsonl:7'."""
  name, _, number = source.partition("#")[0].rpartition(":")
  path = pathlib.PurePosixPath(name if number.isdecimal() else source.partition("#")[0])
  return f"{path.parts[0]}/…{path.suffix}" if len(path.parts) > 1 else str(path)


def _answer_bytes(document: Document) -> list[int]:
  """UTF-8 bytes of the two texts of a preference: the prompt with each of its answers."""
  if examples.is_chat(document, "preference"):
    return [
      sum(len(message["content"].encode()) for message in messages)
      for messages in examples.conversations(document.fields)
    ]
  prompt = len(document.fields.get("prompt", "").encode())
  return [prompt + len(document.fields[name].encode()) for name in ("chosen", "rejected")]


def _batches(items: Iterable[_Kept]) -> Iterator[list[_Kept]]:
  """Groups documents, so that a call to the tokenizer has enough work but little memory."""
  batch: list[_Kept] = []
  chars = 0
  for item in items:
    batch.append(item)
    chars += len(item[2].text)
    if chars >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
      yield batch
      batch, chars = [], 0
  if batch:
    yield batch
