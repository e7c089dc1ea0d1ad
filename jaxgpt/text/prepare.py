"""Plain text to a prepared data folder: read, split, train a tokenizer, tokenize, write.

The input is read twice (once where the tokenizer needs no training) and never held in memory.
"""

import dataclasses
import hashlib
import heapq
import itertools
import os
import pathlib
import secrets
import shutil
import time

from jaxgpt.errors import UserError
from jaxgpt.text import examples, read, shards
from jaxgpt.text import tokenizer as tokenizers

_BATCH_CHARS = 4_000_000  # characters tokenized in one call
_BATCH_DOCUMENTS = 4_096
_FEW_DOCUMENTS = 100
_CUT_INTO = 400  # documents that few are cut into: enough for 5 % of them to be a fair sample
_LEAST_CUT = 100  # characters
_REPORT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What `prepare` can be told, each with its default."""
  # bytes | sentencepiece:SIZE | sentencepiece:SIZE:MODEL_TYPE (bpe, unigram, char) | a .model file
  # | a folder with a saved tokenizer (another prepared folder, to share its tokenizer)
  tokenizer: str = "sentencepiece:4096"
  validation: float = 0.05  # share of the documents that go to the validation split
  test: float = 0.05  # share of the documents that go to the test split
  salt: str = ""  # another salt draws other documents for the splits
  exclude: tuple = ()  # shell patterns of files and folders to leave out
  text_field: str = "text"  # key of the text in a JSON line
  # longer documents are cut after a line, so that one long text can fill all splits; 0: never;
  # None: only where there are few documents
  cut_chars: int | None = None
  sample_bytes: int = 4_000_000  # bytes of training documents that the tokenizer learns from
  symbols: tuple = ()  # texts that are one token each wherever they occur
  shard_tokens: int = 1 << 27  # tokens after which a new shard is begun

  def __post_init__(self):
    for key in ("validation", "test"):
      if not 0 <= getattr(self, key) < 1:
        raise UserError(f"{key}={getattr(self, key)} must be a share in [0, 1)")
    if self.validation + self.test >= 1:
      raise UserError(f"validation={self.validation} and test={self.test} leave nothing to train "
                      "on; their sum must be below 1")
    for key, least in (("sample_bytes", 1), ("shard_tokens", 1), ("cut_chars", 0)):
      if getattr(self, key) is not None and getattr(self, key) < least:
        raise UserError(f"{key}={getattr(self, key)} must be at least {least}")


def prepare(paths, out, *, overwrite=False, report=None, **options):
  """Turns text files into a folder that training reads.

  A document's split depends on nothing but its text and the salt: equal texts share a split, and
  a document stays where it is when the corpus grows. Everything is written to a folder
  `OUT.tmp-…` beside `out` and renamed at the end, so what bears the name `out` is whole.

  Args:
    paths: files, folders and glob patterns, as `read.find` takes them.
    out: the folder to make.
    overwrite: replace a prepared folder that is there. A folder of anything else is never
      touched.
    report: called with a line of text at each stage, and every 10 s; default: nobody.
    **options: the fields of `Options`.

  Returns:
    The manifest (`shards.make_manifest`), which is also in `out`. Equal inputs, options and
    versions give equal digests.

  Raises:
    UserError: a bad option or path, `out` exists, or nothing is left to train on.
  """
  options = Options(**options)
  report = report or (lambda line: None)
  out = pathlib.Path(os.path.abspath(out))
  _check_free(out, overwrite)
  paths = read.find(paths, options.exclude)
  if options.cut_chars is None:
    options = dataclasses.replace(options, cut_chars=_cut_chars(paths, options, report))
  try:
    return _prepare(paths, out, overwrite, options, report)
  except OSError as e:
    raise UserError(f"--out={out} can't be written ({e.strerror or e}); name another folder, make "
                    "room or change its permissions") from e


def _prepare(paths, out, overwrite, options, report):
  out.parent.mkdir(parents=True, exist_ok=True)
  for left in sorted(out.parent.glob(f"{out.name}.tmp-*")):
    report(f"{left} was left by another run: delete it, unless that run is still at work")
  folder = out.with_name(f"{out.name}.tmp-{os.getpid()}-{secrets.token_hex(3)}")
  folder.mkdir()
  try:
    tokenizer = _make_tokenizer(paths, options, report)
    tokenizer.save(folder / "tokenizer")
    manifest = _write(paths, folder, tokenizer, options, report)
    _check_free(out, overwrite)
    _publish(folder, out)
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise
  return manifest


def _cut_chars(paths, options, report):
  """The length to cut at where the corpus has too few documents to fill the splits, or 0."""
  if not options.validation + options.test:
    return 0
  documents = read.documents(paths, fields={"text": options.text_field})
  lengths = [len(d.text) for d in itertools.islice(documents, _FEW_DOCUMENTS)]
  if len(lengths) == _FEW_DOCUMENTS:
    return 0
  size = max(sum(lengths) // _CUT_INTO, _LEAST_CUT)
  if any(length > size for length in lengths):
    report(f"few documents ({len(lengths)}): they are cut after about {size:,} characters, so that "
           "there is something to hold out (--cut-chars=0: don't)")
  return size


def _check_free(out, overwrite):
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return
  if not (out / shards.MANIFEST).is_file():
    raise UserError(f"{out} exists and is no prepared data folder; name another, or delete it "
                    "yourself")
  if not overwrite:
    raise UserError(f"{out} holds prepared data; give --overwrite to replace it, or name another "
                    "folder")


def _publish(folder, out):
  """Renames the finished folder to `out`, after moving aside what is there."""
  old = None
  if out.exists():
    old = folder.with_name(f"{folder.name}-old")
    out.rename(old)
  folder.rename(out)
  if old is not None:
    shutil.rmtree(old, ignore_errors=True)


def _split_of(key, options):
  """The split of a document whose hash is `key`, a number in [0, 1)."""
  if key < options.test:
    return "test"
  return "validation" if key < options.test + options.validation else "train"


def _read(paths, options, dropped, report, verb):
  """(key, document, its UTF-8 length) for each document, with progress reports."""
  salt = options.salt.encode() + b"\0"
  start = said = time.monotonic()
  documents = num_bytes = 0
  for document in _cut(read.documents(paths, fields={"text": options.text_field},
                                      dropped=dropped), options.cut_chars):
    data = document.text.encode()
    key = int.from_bytes(hashlib.sha256(salt + data).digest()[:6], "big") / (1 << 48)
    documents, num_bytes = documents + 1, num_bytes + len(data)
    yield key, document, len(data)
    now = time.monotonic()
    if now - said > _REPORT_SECONDS:
      said = now
      report(f"{verb} {documents:,} documents, {num_bytes / 1e6:,.1f} MB "
             f"({num_bytes / 1e6 / (now - start):.1f} MB/s)")


def _cut(documents, chars):
  for document in documents:
    if not chars or len(document.text) <= chars:
      yield document
      continue
    for number, text in enumerate(read.chunks(document.text, chars), 1):
      yield read.Document(f"{document.source}#{number}", text)


def _make_tokenizer(paths, options, report):
  def sample():
    texts = _sample(paths, options, report)
    report(f"training {options.tokenizer} on {sum(map(len, texts)) / 1e6:,.1f} M characters")
    return texts
  return tokenizers.from_spec(options.tokenizer, sample, sample_bytes=options.sample_bytes,
                              symbols=options.symbols)


def _sample(paths, options, report):
  """Texts of the training split, about `sample_bytes` of them, drawn by their hashes.

  Those with the lowest hashes are kept: an even sample of a stream of unknown length, which the
  order of the files does not change.
  """
  kept, held = [], 0  # a heap whose first entry has the highest hash
  order = itertools.count()
  for key, document, _ in _read(paths, options, None, report, "sampled"):
    if _split_of(key, options) != "train" or (held >= options.sample_bytes and key > -kept[0][0]):
      continue
    text = document.text[:options.sample_bytes]
    heapq.heappush(kept, (-key, next(order), text))
    held += len(text)
    while held - len(kept[0][2]) >= options.sample_bytes:
      held -= len(heapq.heappop(kept)[2])
  if not kept:
    raise _nothing_to_train_on(options)
  return [text for _, _, text in sorted(kept, reverse=True)]


def _nothing_to_train_on(options):
  return UserError(
      "no document for the training split: either none has any text (the rules and counts are "
      f"reported), or all went to validation={options.validation} and test={options.test}; lower "
      "these shares, give more documents (a line of a .jsonl file is one), cut long ones with "
      "cut_chars, or set another salt")


def _write(paths, folder, tokenizer, options, report):
  """Tokenizes all documents into `folder`; the manifest comes last."""
  dropped = read.Dropped()
  writers = {split: shards.SplitWriter(folder, split, tokenizer, options.shard_tokens)
             for split in shards.SPLITS}
  try:
    for batch in _batches(_read(paths, options, dropped, report, "tokenized")):
      encoded = examples.encode_batch([document for _, document, _ in batch], "text", tokenizer)
      for (key, document, num_bytes), stored in zip(batch, encoded):
        writers[_split_of(key, options)].add(stored[0], num_bytes, document.source)
  finally:
    for writer in writers.values():
      writer.close()
  for line in dropped.lines():
    report(line)
  if not writers["train"].num_documents:
    raise _nothing_to_train_on(options)
  splits = {split: writer.finish() for split, writer in writers.items()}
  manifest = shards.make_manifest(tokenizer, splits, dropped.counts)
  shards.write_manifest(folder, manifest)
  for split, entry in splits.items():
    report(f"{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, "
           f"{entry['bytes'] / 1e6:,.2f} MB")
  return manifest


def _batches(items):
  batch, chars = [], 0
  for item in items:
    batch.append(item)
    chars += len(item[1].text)
    if chars >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
      yield batch
      batch, chars = [], 0
  if batch:
    yield batch
