"""The prepared folder: token shards, what is in them, and the manifest that vouches for both.

    DIR/manifest.json                          written last: a folder without it is not finished
    DIR/tokenizer/                             what `tokenizer.load` reads
    DIR/train-00000-of-00002.arrayrecord       token records (also validation-…, test-…)
    DIR/train.tokens.npy                       uint32 [documents], stored tokens of each document
    DIR/train.bytes.npy                        uint32 [documents], UTF-8 bytes of its text
    DIR/card.md, card.json, lengths.svg        the data card (`card`), for people
    DIR/train.sources.txt, .sources.npy        its source name, a line each; uint64 byte offsets

and by the kind of the data (see `examples.Encoded`)

    DIR/train.labels.npy                       classification: float64 [documents]
    DIR/train.second.npy                       classification: uint32 [documents], 0 for one text
    DIR/train.trained.npy, .trained_offsets.npy  seq2seq, chat, preference: int32 [ranges, 2], and
                                               uint64 [documents + 1], which of them are whose

A document is stored as [bos, t1, …, tn, eos] in the manifest's dtype (little endian). A record is
up to `RECORD_TOKENS` consecutive tokens of one document, and the records of a document are
consecutive in one shard, so the lengths alone say in which record each token is.
"""

import array
import hashlib
import json
import os
import pathlib

import numpy as np
from array_record.python import array_record_module
from etils import epath

import jaxgpt
from jaxgpt.errors import UserError
from jaxgpt.storage import atomic, buckets

FORMAT = 2
RECORD_TOKENS = 65_536
MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")
WITH_RANGES = ("seq2seq", "chat", "preference")  # kinds of which only a part is predicted

# A record is found without reading its neighbours. zstd:1 takes 40 % off the disk and the network
# for 3 us a record (15 us against 12 us, 660 tokens a record).
_WRITER_OPTIONS = "group_size:1,zstd:1"


def token_dtype(vocab_size):
  """The narrowest dtype that holds all ids, as a little-endian NumPy dtype."""
  return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def records_of(tokens):
  """Records that documents of so many stored tokens take, elementwise."""
  return -(-np.asarray(tokens, np.int64) // RECORD_TOKENS)


class SplitWriter:
  """Writes one split's shards and its sidecars.

  Shards are named when their number is known, in `finish`. A document is never cut between two
  shards, so a shard may be longer than `shard_tokens` by one document.
  """

  def __init__(self, folder, split, tokenizer, shard_tokens, kind="text"):
    """Starts an empty split.

    Args:
      folder: an existing pathlib.Path to write into.
      split: 'train', 'validation' or 'test'.
      tokenizer: gives the dtype.
      shard_tokens: tokens after which a new shard is begun.
      kind: of the data, one of `examples.KINDS`.
    """
    self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
    self._kind = kind
    self._dtype = token_dtype(tokenizer.vocab_size)
    self._labels, self._second = array.array("d"), array.array("I")
    self._trained, self._trained_ends = array.array("i"), array.array("Q", [0])
    self._tokens, self._bytes = array.array("I"), array.array("I")
    self._source_ends = array.array("Q", [0])
    self._sources = (folder / f"{split}.sources.txt").open("wb")
    self._shards = []  # of dicts documents, tokens, records
    self._writer = None

  @property
  def num_documents(self):
    return len(self._tokens)

  def add(self, encoded, num_bytes, source):
    """Appends a document.

    Args:
      encoded: an `examples.Encoded` of the writer's kind.
      num_bytes: UTF-8 bytes of its text.
      source: its name.
    """
    stored = encoded.ids.astype(self._dtype)
    if self._writer is None or self._shards[-1]["tokens"] >= self._shard_tokens:
      self._next_shard()
    for start in range(0, len(stored), RECORD_TOKENS):
      self._writer.write(stored[start : start + RECORD_TOKENS].tobytes())
    shard = self._shards[-1]
    shard["documents"] += 1
    shard["tokens"] += len(stored)
    shard["records"] += int(records_of(len(stored)))
    self._tokens.append(len(stored))
    self._bytes.append(num_bytes)
    self._source_ends.append(
      self._source_ends[-1] + self._sources.write(os.fsencode(source) + b"\n")
    )
    if self._kind == "classification":
      self._labels.append(encoded.label)
      self._second.append(encoded.second or 0)
    elif self._kind in WITH_RANGES:
      self._trained.extend(encoded.trained.reshape(-1).tolist())
      self._trained_ends.append(len(self._trained) // 2)

  def _next_shard(self):
    self.close()
    self._writer = array_record_module.ArrayRecordWriter(
      str(self._unnamed(len(self._shards))), _WRITER_OPTIONS
    )
    self._shards.append({"documents": 0, "tokens": 0, "records": 0})

  def _unnamed(self, number):
    return self._folder / f"{self._split}-{number:05d}.unfinished"

  def close(self):
    """Closes the shard that is being written."""
    if self._writer is not None:
      self._writer.close()
      self._writer = None

  def finish(self):
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
      shard.update(_describe(path))
    sidecars = [self._folder / f"{self._split}.sources.txt"]
    for name, column in self._columns().items():
      sidecars.append(self._folder / f"{self._split}.{name}.npy")
      np.save(sidecars[-1], column)
    return {
      "documents": len(self._tokens),
      "tokens": sum(self._tokens),
      "bytes": sum(self._bytes),
      "shards": self._shards,
      "sidecars": [_describe(path) for path in sidecars],
    }

  def _columns(self):
    """{name: array} of the sidecars that this kind has."""
    out = {
      "tokens": np.array(self._tokens, "<u4"),
      "bytes": np.array(self._bytes, "<u4"),
      "sources": np.array(self._source_ends, "<u8"),
    }
    if self._kind == "classification":
      out |= {"labels": np.array(self._labels, "<f8"), "second": np.array(self._second, "<u4")}
    elif self._kind in WITH_RANGES:
      out |= {
        "trained": np.array(self._trained, "<i4").reshape(-1, 2),
        "trained_offsets": np.array(self._trained_ends, "<u8"),
      }
    return out


def _describe(path):
  with path.open("rb") as f:
    digest = hashlib.file_digest(f, "sha256").hexdigest()
  return {"name": path.name, "size": path.stat().st_size, "sha256": digest}


def make_manifest(tokenizer, splits, dropped, kind="text", label_names=(), template=None):
  """The manifest: equal for equal inputs, so its digest names the data.

  Args:
    tokenizer: the one that all splits were written with.
    splits: {split: what `SplitWriter.finish` returned}.
    dropped: a `read.Dropped`, the account of what was read.
    kind: of the data, one of `examples.KINDS`.
    label_names: of the classes, in their order.
    template: name of the chat template, of kind chat.

  Returns:
    A JSON-able dict without times and paths; 'digest' is the sha256 of the canonical JSON of all
    the rest.
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
  manifest["digest"] = manifest_digest(manifest)
  return manifest


def manifest_digest(manifest):
  """sha256, in hex, of the canonical JSON of a manifest without its 'digest'."""
  content = {key: value for key, value in manifest.items() if key != "digest"}
  text = json.dumps(content, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(folder, manifest):
  """Writes `manifest.json` in one step: it is there and whole, or it is not there."""
  atomic.write(pathlib.Path(folder, MANIFEST), json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder):
  """The manifest of a prepared folder.

  Raises:
    UserError: there is none, it is damaged, or it has a format that this version does not read.
  """
  buckets.check(folder)
  path = epath.Path(folder) / MANIFEST
  if not path.is_file():
    raise UserError(
      f"data.path={os.fspath(folder)!r} is no prepared data folder: it has no "
      f"{MANIFEST}; run `jaxgpt data` first, or set --config.data.path"
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
