"""Tasks that make the tokenizer and write token shards."""

import functools
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.storage import malloc
from jaxgpt.text.prepare import document_store, shards
from jaxgpt.text.prepare.jobs import Account, Counter, Report
from jaxgpt.text.prepare.options import Options
from jaxgpt.text.prepare.tasks.filtering import Corpus
from jaxgpt.text.prepare.tasks.reading import SizedDropped
from jaxgpt.text.readers import messages
from jaxgpt.text.readers.documents import Document
from jaxgpt.text.tokenizers import base, chat_template, examples
from jaxgpt.text.tokenizers import tokenizer as tokenizers
from jaxgpt.text.tokenizers.base import EncodingError
from jaxgpt.text.tokenizers.encoded import Refused

_BATCH_DOCUMENTS = 4_096  # tokenized in one call, from one block of the store
_MUCH_UNKNOWN = 0.01  # share of unknown tokens that deserves a warning
_NUMBERS = re.compile(r"(:[0-9]+)?(#[0-9]+)?\Z")  # of a document in its file, and of its piece

_Writers = dict[str, shards.SplitWriter]


class _Batch(NamedTuple):
  """Documents to tokenize in one call.

  Attributes:
    documents: The documents.
    splits: uint8 [documents], numbers of their splits.
    sizes: int64 [documents], UTF-8 bytes of their texts.
  """

  documents: list[Document]
  splits: np.ndarray
  sizes: np.ndarray


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
    store = document_store.Store(folder)
    index, mask = store.index, store.splits(options.shares) == 0
    mask[list(corpus.removed(task))] = False
    number = np.flatnonzero(mask)
    found = np.stack(
      [
        # Documents of one group have one key, and would come as a whole.
        index["digest"][number, 0] if options.split_by else index["key"][number],
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
    "no document for the training split: either none has any text"
    + (f" and a column {options.split_by!r}" if options.split_by else "")
    + " (the rules and counts are "
    f"reported), or all went to validation={options.shares.validation:g} and "
    f"test={options.shares.test:g}; lower "
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
  template = _template(options, tokenizer)
  dropped, sources = SizedDropped(options.examples), _Sources()
  templated, encoded = False, 0
  writers = {
    split: shards.SplitWriter(folder, split, tokenizer, options.shard_tokens, options.kind)
    for split in shards.SPLITS
  }
  try:
    encode = functools.partial(
      examples.encode_batch,
      kind=options.kind,
      tokenizer=tokenizer,
      template=template,
      label_names=label_names,
    )
    for batch in _kept(corpus, rank, options, dropped):
      progress(len(batch.documents), int(batch.sizes.sum()))
      if options.kind == "text":
        for written in _write_texts(batch, tokenizer, writers, dropped):
          sources.count(written)
          encoded += len(written.documents)
        continue
      stored = examples.or_errors(batch.documents, encode)
      kept = []
      for number, (document, texts) in enumerate(zip(batch.documents, stored)):
        num_bytes = int(batch.sizes[number])
        if isinstance(texts, UserError):
          dropped.at_hand = num_bytes
          dropped.add(_rule(texts), document.source, str(texts))
          continue
        if examples.is_chat(document, options.kind):
          templated = True
          if why := examples.nothing_learned(texts):
            dropped.at_hand = num_bytes
            dropped.add("nothing learned", document.source, why)
            continue
        if options.kind == "preference" and examples.equal(*texts):
          dropped.at_hand = num_bytes
          dropped.add("equal answers", document.source, "chosen and rejected have the same tokens")
          continue
        kept.append(number)
        sizes = [num_bytes] if len(texts) == 1 else _each_bytes(document, options.kind)
        for text, size in zip(texts, sizes):
          writers[shards.SPLITS[batch.splits[number]]].add(text, size, document.source)
      sources.count(batch, kept)
      encoded += len(kept)
  finally:
    for writer in writers.values():
      writer.close()
  return {
    "splits": {split: writer.finish() for split, writer in writers.items()},
    "dropped": dropped.to_json(),
    "dropped_bytes": dropped.bytes,
    "encoded": encoded,
    "unknown": sum(writer.unknown for writer in writers.values()),
    "sources": sources.counts,
    "template": template.name if template and templated else None,
  }


def _template(options: Options, tokenizer: tokenizers.Tokenizer) -> chat_template.Template | None:
  """The template that writes the conversations, or None for a kind without them."""
  if options.kind not in ("chat", "preference"):
    return None
  return chat_template.load(
    options.template,
    tokenizer,
    variables=dict(options.template_variables),
    last_turn=options.train_on == "last",
  )


def check_unknown(accounts: Sequence[Account], options: Options, tell: Report) -> int:
  """Reports how many tokens are the unknown token.

  Args:
    accounts: The accounts of `tokenize`.
    options: The options of the preparation.
    tell: Takes a line.

  Returns:
    The number of unknown tokens.

  Raises:
    UserError: Their share of all tokens is above `max_unknown`.
  """
  unknown = sum(account.get("unknown", 0) for account in accounts)
  total = sum(split["tokens"] for account in accounts for split in account["splits"].values())
  share = unknown / max(total, 1)
  if options.max_unknown is not None and share > options.max_unknown:
    raise UserError(
      f"max_unknown={options.max_unknown:g}: {unknown:,} of {total:,} tokens ({share:.1%}) are the "
      f"unknown token: tokenizer={options.tokenizer} lacks characters of this text; name another "
      "tokenizer, or allow more"
    )
  if share > _MUCH_UNKNOWN:
    tell(
      f"warning: {unknown:,} of {total:,} tokens ({share:.1%}) are the unknown token: the "
      "tokenizer lacks characters of this text, which are lost; --tokenizer names another"
    )
  elif unknown:
    tell(f"unknown tokens: {unknown:,} of {total:,} ({share:.2%})")
  return unknown


def _write_texts(
  batch: _Batch, tokenizer: tokenizers.Tokenizer, writers: _Writers, dropped: SizedDropped
) -> Iterator[_Batch]:
  """Writes documents of kind text, each as [bos, tokens…, eos].

  Yields:
    The batch, or the parts of it that were written if the tokenizer fails on one of the documents.
  """
  try:
    if len(batch.documents) == 1 and len(batch.documents[0].text) > base.LONG:
      _write_long(batch, tokenizer, writers)
    else:
      _write_batch(batch, tokenizer, writers)
    yield batch
  except EncodingError as e:
    if len(batch.documents) == 1:
      dropped.at_hand = int(batch.sizes[0])
      dropped.add("tokenizer", batch.documents[0].source, str(e))
      return
    half = len(batch.documents) // 2
    for part in (slice(half), slice(half, None)):
      some = _Batch(batch.documents[part], batch.splits[part], batch.sizes[part])
      yield from _write_texts(some, tokenizer, writers, dropped)


def _write_long(batch: _Batch, tokenizer: tokenizers.Tokenizer, writers: _Writers) -> None:
  """Writes a long document in pieces."""
  document, split = batch.documents[0], shards.SPLITS[batch.splits[0]]
  writer = writers[split]
  try:
    writer.add_long(_stored(document.text, tokenizer), int(batch.sizes[0]), document.source)
  except EncodingError as e:  # some of it may be written
    raise UserError(f"{document.source}: {e}; remove it, or name another tokenizer") from e


def _write_batch(batch: _Batch, tokenizer: tokenizers.Tokenizer, writers: _Writers) -> None:
  """Writes documents that are tokenized in one call."""
  ids, lengths = tokenizer.encode_joined([document.text for document in batch.documents])
  ends = np.cumsum(lengths + 2)
  starts = ends - lengths - 2
  is_text = np.ones(int(lengths.sum()) + 2 * len(lengths), bool)
  is_text[starts] = is_text[ends - 1] = False
  stored = np.empty(len(is_text), np.int32)
  stored[is_text], stored[starts], stored[ends - 1] = ids, tokenizer.bos_id, tokenizer.eos_id
  for number, split in enumerate(shards.SPLITS):
    chosen = np.flatnonzero(batch.splits == number)
    names = [batch.documents[i].source for i in chosen.tolist()]
    writers[split].add_texts(stored, starts[chosen], ends[chosen], batch.sizes[chosen], names)


def _stored(text: str, tokenizer: tokenizers.Tokenizer) -> Iterator[np.ndarray]:
  """The stored tokens of a long text, a piece at a time."""
  yield np.array([tokenizer.bos_id], np.int32)
  for piece in tokenizer.pieces(text):
    yield tokenizer.encode_joined([piece])[0]
  yield np.array([tokenizer.eos_id], np.int32)


def _kept(corpus: Corpus, rank: int, options: Options, dropped: SizedDropped) -> Iterator[_Batch]:
  """The documents that stay, in batches. The others are counted in `dropped`."""
  store, goes = document_store.Store(corpus.stores[rank]), corpus.removed(rank)
  splits = store.splits(options.shares)
  sizes = store.index["bytes"].astype(np.int64)
  for first, documents in store.blocks():
    for start in range(0, len(documents), _BATCH_DOCUMENTS):
      numbers = range(first + start, first + min(start + _BATCH_DOCUMENTS, len(documents)))
      stay = [number for number in numbers if number not in goes] if goes else numbers
      for number in numbers if len(stay) < len(numbers) else ():
        if number in goes:
          _drop(corpus, documents[number - first], goes[number], int(sizes[number]), dropped)
      if stay:
        chosen = np.array(stay)
        kept = [documents[number - first] for number in stay]
        yield _Batch(kept, splits[chosen], sizes[chosen])


def _drop(
  corpus: Corpus, document: Document, cause: tuple[str, Any], size: int, dropped: SizedDropped
) -> None:
  """Counts a document that goes. `cause` is an entry of `filtering.removed`."""
  rule, why = cause
  dropped.at_hand = size
  if isinstance(why, tuple):  # looking up its name takes a while, and only examples need it
    is_example = dropped.counts.get(rule, 0) < dropped.limit
    why = f"like {source_of(corpus.stores, *why)}" if is_example else ""
  dropped.add(rule, document.source, why)


class _Sources:
  """Documents and bytes of each group of sources, for the data card.

  Attributes:
    counts: {group: [documents, UTF-8 bytes]}.
  """

  def __init__(self) -> None:
    self.counts: dict[str, list[int]] = {}
    self._of_file: dict[str, list[int]] = {}  # file of records -> the counts of its group

  def count(self, batch: _Batch, chosen: Sequence[int] | None = None) -> None:
    """Counts the documents of a batch, or some of them by number."""
    sizes = batch.sizes.tolist()
    for i in range(len(sizes)) if chosen is None else chosen:
      source = batch.documents[i].source
      name, _, number = source.rpartition(":")
      if not number.isdecimal():
        name = source
      found = self._of_file.get(name)
      if found is None:
        found = self.counts.setdefault(_source_group(source), [0, 0])
        self._of_file[name] = found
      found[0] += 1
      found[1] += sizes[i]


def source_of(stores: Sequence[pathlib.Path], rank: int, number: int) -> str:
  """The name of a document, by its store and its number there."""
  return next(document_store.Store(stores[rank]).take([number])).source


def _source_group(source: str) -> str:
  """The group that the data card sums up: 'corpus/….jsonl' for 'corpus/a/b.jsonl:7'."""
  path = pathlib.PurePosixPath(_NUMBERS.sub("", source))
  return f"{path.parts[0]}/…{path.suffix}" if len(path.parts) > 1 else str(path)


def _rule(error: UserError) -> str:
  """The rule that a document which cannot be stored is counted under."""
  if isinstance(error, Refused):
    return error.rule
  return "tokenizer" if isinstance(error, EncodingError) else "chat template"


def _each_bytes(document: Document, kind: str) -> list[int]:
  """UTF-8 bytes of the two texts that a document becomes.

  Those of a preference are the prompt with each of its answers.
  """
  if kind == "retrieval":
    return [len(document.fields[name].encode()) for name in ("query", "positive")]
  if examples.is_chat(document, kind):
    return [
      sum(len(string.encode()) for m in conversation for string in messages.words(m))
      for conversation in examples.conversations(document.fields)
    ]
  prompt = len(document.fields.get("prompt", "").encode())
  return [prompt + len(document.fields[name].encode()) for name in ("chosen", "rejected")]
