"""The prepared folder: token shards, sidecars about the documents in them, and the manifest.

    DIR/manifest.json                          written last: a folder without it is unfinished
    DIR/tokenizer/                             see `tokenizer.load`
    DIR/train-00000-of-00002.arrayrecord       token records (also validation-…, test-…)
    DIR/train.tokens.npy                       uint32 [documents], stored tokens of each document
    DIR/train.bytes.npy                        uint32 [documents], UTF-8 bytes of its text
    DIR/train.sources.txt, .sources.npy        its source, one per line; uint64 line offsets
    DIR/card.md, card.json, lengths.svg        the data card (`data_card`), for people

Some kinds of data have more sidecars (see `Encoded`):

    DIR/train.labels.npy                       classification: float64 [documents]
    DIR/train.second.npy                       classification, multi_label, question_answering:
                                               uint32 [documents], first token of the second text;
                                               0: there is one text
    DIR/train.trained.npy                      seq2seq, chat, preference: int32 [ranges, 2], ranges
                                               of the tokens that the loss counts
    DIR/train.labels.npy                       multi_label: int32 [labels], classes
    DIR/train.tags.npy                         tagging: int32 [words, 2], the first token of each
                                               word, and its class
    DIR/train.answers.npy                      question_answering: int32 [answers, 2], ranges of
                                               tokens
    DIR/train.NAME_offsets.npy                 uint64 [documents + 1], for each of the last four:
                                               document d has the entries [d] to [d + 1]

A document is stored as [bos, t1, …, tn, eos] in the manifest's dtype (little endian). A record is
up to `RECORD_TOKENS` consecutive tokens of one document, and the records of a document are
consecutive in one shard. So the lengths alone determine the record of each token:

    documents   | d0: 100,000 tokens                | d1: 500      | d2: 70,000 tokens
    records     | 65,536        | 34,464            | 500          | 65,536       | 4,464
"""

import array
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from array_record.python import array_record_module
from etils import epath

import jaxgpt
from jaxgpt.errors import UserError
from jaxgpt.storage import atomic, buckets, strict_json
from jaxgpt.text.prepare.assemble import describe
from jaxgpt.text.readers.documents import Dropped
from jaxgpt.text.tokenizers.base import Tokenizer
from jaxgpt.text.tokenizers.encoded import Encoded

FORMAT = 2
RECORD_TOKENS = 65_536
MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")
# In the manifest, and not in its digest.
NOT_CONTENT = ("passed_over", "unknown_tokens", "other_digests")
# The sidecar with any number of entries per document, by kind, and the columns of an entry.
ENTRIES = {
  "seq2seq": "trained",
  "chat": "trained",
  "preference": "trained",
  "multi_label": "labels",
  "tagging": "tags",
  "question_answering": "answers",
}
_SHAPES = {"trained": (-1, 2), "labels": (-1,), "tags": (-1, 2), "answers": (-1, 2)}
WITH_SECOND = ("classification", "multi_label", "question_answering")  # kinds of two texts

# Groups of one record: a record is read without its neighbours. zstd:1 saves 40 % of disk and
# network for 3 us per record (15 us instead of 12 us, at 660 tokens per record).
_WRITER_OPTIONS = "group_size:1,zstd:1"


def token_dtype(vocab_size: int) -> np.dtype:
  """The narrowest little-endian dtype that holds all ids."""
  return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def records_of(tokens: npt.ArrayLike) -> np.ndarray:
  """Number of records of documents with these numbers of stored tokens, elementwise."""
  return -(-np.asarray(tokens, np.int64) // RECORD_TOKENS)


def offsets_of(name: str) -> str:
  """The name of the sidecar that says which entries of another one a document has."""
  return f"{name}_offsets"


class SplitWriter:
  """Writes one split's shards and its sidecars.

  `finish` names the shards, when their number is known. A document is never cut between two shards,
  so a shard may be longer than `shard_tokens` by one document.

  Attributes:
    unknown: Tokens written that are the tokenizer's unknown token.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    split: str,
    tokenizer: Tokenizer,
    shard_tokens: int,
    kind: str = "text",
  ):
    """Starts an empty split.

    Args:
      folder: An existing folder to write into.
      split: 'train', 'validation' or 'test'.
      tokenizer: Gives the dtype.
      shard_tokens: Tokens after which another shard is started.
      kind: Kind of the data, a key of `kinds.KINDS`.
    """
    self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
    self._kind = kind
    self._dtype = token_dtype(tokenizer.vocab_size)
    self._unk_id, self.unknown = tokenizer.unk_id, 0
    self._labels, self._second = array.array("d"), array.array("I")
    self._entries, self._entry_ends = array.array("i"), array.array("Q", [0])
    self._tokens, self._bytes = array.array("I"), array.array("I")
    self._source_ends = array.array("Q", [0])
    self._sources = (folder / f"{split}.sources.txt").open("wb")
    self._shards: list[dict[str, Any]] = []  # documents, tokens, records
    self._writer: Any = None

  @property
  def num_documents(self) -> int:
    """Documents written so far."""
    return len(self._tokens)

  def add(self, encoded: Encoded, num_bytes: int, source: str) -> None:
    """Appends a document.

    Args:
      encoded: A document of the writer's kind.
      num_bytes: UTF-8 bytes of its text.
      source: Its name.
    """
    self.add_long([encoded.ids], num_bytes, source)
    if self._kind == "classification":
      assert encoded.label is not None
      self._labels.append(encoded.label)
    if self._kind in WITH_SECOND:
      self._second.append(encoded.second or 0)
    if self._kind in ENTRIES:
      entries = getattr(encoded, ENTRIES[self._kind])
      assert entries is not None
      self._entries.extend(entries.reshape(-1).tolist())
      self._entry_ends.append(self._entry_ends[-1] + len(entries))

  def add_long(self, pieces: Iterable[np.ndarray], num_bytes: int, source: str) -> None:
    """Appends a document of kind text whose stored tokens come in pieces."""
    self._make_room()
    tokens = records = 0
    for record in _records(pieces, self._dtype):
      self._count_unknown(record)
      self._writer.write(record.tobytes())
      tokens, records = tokens + len(record), records + 1
    self._count(1, tokens, records)
    self._tokens.append(tokens)
    self._bytes.append(num_bytes)
    self._add_sources([source])

  def add_texts(
    self,
    stored: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    num_bytes: np.ndarray,
    sources: Sequence[str],
  ) -> None:
    """Appends many documents of kind text: as `add` for each, in a tenth of the time.

    Args:
      stored: Tokens of the documents, among others.
      starts, ends: int64 [documents], each document's range in `stored`.
      num_bytes: [documents], UTF-8 bytes of their texts.
      sources: Their names.
    """
    lengths = ends - starts
    total = int(lengths.sum())
    room = self._shard_tokens - (self._shards[-1]["tokens"] if self._shards else 0)
    if total >= room or lengths.max(initial=0) > RECORD_TOKENS:
      for start, end, size, source in zip(starts, ends, num_bytes.tolist(), sources):
        self.add_long([stored[start:end]], size, source)
      return
    if not len(lengths):
      return
    self._make_room()
    if self._unk_id is not None:
      at = np.flatnonzero(stored == self._unk_id)
      number = np.searchsorted(starts, at, side="right") - 1
      self.unknown += int(np.count_nonzero((number >= 0) & (at < ends[number])))
    data, width = stored.astype(self._dtype, copy=False).tobytes(), self._dtype.itemsize
    write = self._writer.write
    for start, end in zip((starts * width).tolist(), (ends * width).tolist()):
      write(data[start:end])
    self._count(len(lengths), total, len(lengths))
    self._tokens.frombytes(lengths.astype(np.uint32).tobytes())
    self._bytes.frombytes(num_bytes.astype(np.uint32).tobytes())
    self._add_sources(sources)

  def _add_sources(self, sources: Sequence[str]) -> None:
    names = [os.fsencode(source) for source in sources]
    self._sources.write(b"\n".join([*names, b""]))
    sizes = itertools.accumulate((len(name) + 1 for name in names), initial=self._source_ends.pop())
    self._source_ends.extend(sizes)

  def _count(self, documents: int, tokens: int, records: int) -> None:
    shard = self._shards[-1]
    shard["documents"] += documents
    shard["tokens"] += tokens
    shard["records"] += records

  def _make_room(self) -> None:
    """Starts a shard if there is none, or the last one is full."""
    if self._writer is None or self._shards[-1]["tokens"] >= self._shard_tokens:
      self._next_shard()

  def _count_unknown(self, stored: np.ndarray) -> None:
    if self._unk_id is not None:
      self.unknown += int(np.count_nonzero(stored == self._unk_id))

  def _next_shard(self) -> None:
    self.close()
    self._writer = array_record_module.ArrayRecordWriter(
      str(self._unnamed(len(self._shards))), _WRITER_OPTIONS
    )
    self._shards.append({"documents": 0, "tokens": 0, "records": 0})

  def _unnamed(self, number: int) -> pathlib.Path:
    return self._folder / f"{self._split}-{number:05d}.unfinished"

  def close(self) -> None:
    """Closes the shard that is being written."""
    if self._writer is not None:
      self._writer.close()
      self._writer = None

  def finish(self) -> dict[str, Any]:
    """Closes and names all files.

    Returns:
      The split's entry in the manifest: documents, tokens, bytes, and for each shard and sidecar
      its name, size in bytes and sha256.
    """
    self.close()
    self._sources.close()
    for i, shard in enumerate(self._shards):
      path = self._folder / f"{self._split}-{i:05d}-of-{len(self._shards):05d}.arrayrecord"
      self._unnamed(i).rename(path)
      shard.update(describe(path))
    sidecars = [self._folder / f"{self._split}.sources.txt"]
    for name, column in self._columns().items():
      sidecars.append(self._folder / f"{self._split}.{name}.npy")
      np.save(sidecars[-1], column)
    return {
      "documents": len(self._tokens),
      "tokens": sum(self._tokens),
      "bytes": sum(self._bytes),
      "shards": self._shards,
      "sidecars": [describe(path) for path in sidecars],
    }

  def _columns(self) -> dict[str, np.ndarray]:
    """The arrays of this kind's sidecars by name."""
    out = {
      "tokens": np.array(self._tokens, "<u4"),
      "bytes": np.array(self._bytes, "<u4"),
      "sources": np.array(self._source_ends, "<u8"),
    }
    if self._kind == "classification":
      out["labels"] = np.array(self._labels, "<f8")
    if self._kind in WITH_SECOND:
      out["second"] = np.array(self._second, "<u4")
    if self._kind in ENTRIES:
      name = ENTRIES[self._kind]
      out[name] = np.array(self._entries, "<i4").reshape(_SHAPES[name])
      out[offsets_of(name)] = np.array(self._entry_ends, "<u8")
    return out


def _records(pieces: Iterable[np.ndarray], dtype: np.dtype) -> Iterator[np.ndarray]:
  """The records of a document whose tokens come in pieces of any length."""
  held: list[np.ndarray] = []
  count = 0
  for piece in pieces:
    held.append(piece.astype(dtype))
    count += len(piece)
    if count < RECORD_TOKENS:
      continue
    joined = np.concatenate(held)
    whole = count - count % RECORD_TOKENS
    for start in range(0, whole, RECORD_TOKENS):
      yield joined[start : start + RECORD_TOKENS]
    held, count = [joined[whole:]], count - whole
  if count:
    yield np.concatenate(held)


def make_manifest(
  tokenizer: Tokenizer,
  splits: dict[str, dict[str, Any]],
  dropped: Dropped,
  kind: str = "text",
  label_names: Sequence[str] = (),
  template: str | None = None,
  template_variables: Mapping[str, Any] | None = None,
  split_by: str = "",
  own_files: Sequence[str] = (),
  about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Makes the manifest. Equal inputs give equal manifests, so its digest identifies the data.

  Args:
    tokenizer: The tokenizer of all splits.
    splits: {split: the result of `SplitWriter.finish`}.
    dropped: The account of the documents that were read.
    kind: Kind of the data, a key of `kinds.KINDS`.
    label_names: Names of the classes, in order.
    template: Name of the chat template, if one was applied.
    template_variables: Its variables, where a conversation did not set them.
    split_by: Column that decided the splits, if it was not the text.
    own_files: Held-out splits that have files of their own.
    about: Values of `NOT_CONTENT`. Those that are 0 or empty are left out.

  Returns:
    A JSON-able dict without times and paths. 'digest' is the sha256 of the canonical JSON of the
    rest.
  """
  manifest = {
    "format": FORMAT,
    "jaxgpt": jaxgpt.__version__,
    "tokenizer": {
      "kind": tokenizer.kind,
      "digest": tokenizer.digest,
      "vocab_size": tokenizer.vocab_size,
      "bos_id": tokenizer.bos_id,
      "eos_id": tokenizer.eos_id,
      "pad_id": tokenizer.pad_id,
    },
    "kind": kind,
    "label_names": list(label_names),
    "chat_template": template,
    "dtype": token_dtype(tokenizer.vocab_size).name,
    "record_tokens": RECORD_TOKENS,
    "splits": splits,
    "read": dropped.read,
    "kept": dropped.kept,
    "dropped": dict(sorted(dropped.counts.items())),
    "total": {
      key: sum(split[key] for split in splits.values()) for key in ("documents", "tokens", "bytes")
    },
  }
  if template and template_variables:
    manifest["template_variables"] = dict(template_variables)
  manifest |= {"split_by": split_by} if split_by else {}
  manifest |= {"own_files": list(own_files)} if own_files else {}
  manifest["digest"] = manifest_digest(manifest)
  return manifest | {key: value for key, value in (about or {}).items() if value}


def manifest_digest(manifest: dict[str, Any]) -> str:
  """The sha256, in hex, of the canonical JSON of a manifest without 'digest' and `NOT_CONTENT`."""
  rest = ("digest", *NOT_CONTENT)
  content = {key: value for key, value in manifest.items() if key not in rest}
  text = strict_json.dumps(content, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def other_digests(folder: pathlib.Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
  """The manifest's entry on what its digest does not cover: files that it does not list, remarks.

  Args:
    folder: The folder, complete except for the manifest.
    manifest: The manifest.

  Returns:
    {'files': {name: sha256} of the tokenizer and the data card, 'remarks': sha256}.
  """
  entries = manifest["splits"].values()
  listed = {file["name"] for e in entries for file in (*e["shards"], *e["sidecars"])}
  names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
  others = [name for name in names if name not in listed and name != MANIFEST]
  digests = {name: describe(folder / name)["sha256"] for name in others}
  return {"files": digests, "remarks": remarks_digest(manifest)}


def remarks_digest(manifest: Mapping[str, Any]) -> str:
  """The sha256, in hex, of the remarks of a manifest: `NOT_CONTENT` without 'other_digests'."""
  remarks = [key for key in NOT_CONTENT if key in manifest and key != "other_digests"]
  found = {key: manifest[key] for key in remarks}
  return hashlib.sha256(strict_json.dumps(found, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: epath.PathLike, manifest: dict[str, Any]) -> None:
  """Writes `manifest.json` atomically."""
  atomic.write(pathlib.Path(folder, MANIFEST), strict_json.dumps(manifest, indent=1) + "\n")


def exists(folder: epath.PathLike) -> bool:
  """Whether a folder has a manifest."""
  buckets.check(folder)
  return (epath.Path(folder) / MANIFEST).is_file()


def read_manifest(folder: epath.PathLike) -> dict[str, Any]:
  """Reads the manifest of a prepared folder.

  Raises:
    UserError: There is none, it is damaged, or this version does not read its format.
  """
  path = epath.Path(folder) / MANIFEST
  if not exists(folder):
    raise UserError(
      f"data.path={os.fspath(folder)!r} is not a prepared data folder: it has no "
      f"{MANIFEST}; name a prepared folder, or run `jaxgpt data`"
    )
  try:
    manifest = json.loads(path.read_text())
    version, digest = manifest["format"], manifest["digest"]
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(f"{path} is damaged ({e}); run `jaxgpt data` again") from e
  if version != FORMAT:
    raise UserError(
      f"{path} has format {version}, this version of jaxgpt reads {FORMAT}; run `jaxgpt data` again"
    )
  if digest != manifest_digest(manifest):
    raise UserError(
      f"{path} was changed: its content does not match its digest; run `jaxgpt data` again"
    )
  return manifest
