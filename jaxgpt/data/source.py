"""A split of a prepared folder, with random access to any range of any document's tokens."""

import collections
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath
from numpy.typing import ArrayLike

from jaxgpt.data import label_numbers, verify
from jaxgpt.errors import UserError, first_line
from jaxgpt.storage import buckets
from jaxgpt.text.prepare import shards

# Random access gains nothing from reading ahead.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_OPEN_READERS = 128  # limit on open shards, over all splits of a process


class _Readers:
  """A cache of open shards, least recently used first. An evicted one closes after its reads."""

  def __init__(self, limit: int):
    self._limit, self._lock = limit, threading.Lock()
    self._open: collections.OrderedDict[tuple[str, str], Any] = (
      collections.OrderedDict()
    )  # (path, version) -> reader

  def get(self, path: str, version: str) -> Any:
    """The reader of a file. `version` distinguishes files that had the same name at other times."""
    key = path, version
    with self._lock:
      reader = self._open.get(key)
      if reader is None:
        # Not ArrayRecordDataSource: its __getitems__ starts a thread pool for each call, which
        # takes five times as long as reading.
        reader = self._open[key] = array_record_module.ArrayRecordReader(
          path, options=_READER_OPTIONS, file_reader_buffer_size=32_768
        )
        if len(self._open) > self._limit:
          self._open.popitem(last=False)
      else:
        self._open.move_to_end(key)
    return reader


_readers = _Readers(_OPEN_READERS)


def open_split(folder: epath.PathLike, split: str) -> "Split":
  """Opens one split of a prepared folder.

  Checks the manifest, the size of each shard and sidecar, the digests of small ones, and that the
  lengths agree with the shards. Opens no shard.

  Args:
    folder: The prepared folder.
    split: 'train', 'validation' or 'test'.

  Raises:
    UserError: The split doesn't exist or is empty, or a file of the folder is damaged.
  """
  manifest = shards.read_manifest(folder)
  if split not in manifest["splits"]:
    raise UserError(
      f"split {split!r} is not in {os.fspath(folder)!r}; it has {', '.join(manifest['splits'])}"
    )
  entry = manifest["splits"][split]
  if not entry["documents"]:
    raise UserError(
      f"the {split} split of {os.fspath(folder)!r} is empty: its share of "
      f"{manifest['total']['documents']} documents came to none; run `jaxgpt data` "
      f"with a larger --{split} share, more documents, or cut_chars to cut long "
      "ones"
    )
  files = verify.files_of(entry)
  sizes = buckets.sizes(folder, [file["name"] for file in files])
  for file in files:
    size = sizes.get(file["name"])
    if size != file["size"]:
      found = "is missing" if size is None else f"has {size} bytes instead of {file['size']}"
      raise UserError(
        f"{epath.Path(folder) / file['name']} {found}: the prepared folder is "
        "damaged; run `jaxgpt data` again"
      )
  verify.check_small(folder, split, manifest)
  return Split(folder, split, manifest)


class Split:
  """Documents of one split. Safe to share between threads, and picklable.

  Attributes:
    lengths: int64 [num_documents], the predictions (stored tokens - 1) of each document.
    bytes: UTF-8 bytes of the split's texts, the denominator of bits per byte.
    kind: Kind of the data, one of `examples.KINDS`.
    label_names: Names of the classes in order, or [] if labels are numbers.
    labels: For classification float64 [num_documents], a class index or a value. Else None.
    second: For kinds with two texts uint32 [num_documents], the stored token at which the second
      text starts, or 0 without a second text. Else None.
    num_documents: Number of documents.
    manifest: The folder's manifest.
    digest: Its SHA-256.
    rows: Rows of the model's embedding, if the tokenizer has ids beyond them. Reading such an id
      is an error. None: no check.
  """

  def __init__(self, folder: epath.PathLike, split: str, manifest: dict[str, Any]):
    """Use `open_split`, which checks the arguments."""
    self.split, self.manifest, self.digest = split, manifest, manifest["digest"]
    self.rows: int | None = None
    self._files = buckets.Files(folder, self.digest)
    entry = manifest["splits"][split]
    self._sidecars = {file["name"]: file for file in entry["sidecars"]}
    self.bytes, self.num_documents = entry["bytes"], entry["documents"]
    self.kind, self.label_names = manifest["kind"], manifest["label_names"]
    self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    self._record_tokens = manifest["record_tokens"]
    stored = self._sidecar("tokens").astype(np.int64)
    self.lengths = stored - 1
    records = -(-stored // self._record_tokens)
    self._first_record = np.cumsum(records) - records
    shard_records = [shard["records"] for shard in entry["shards"]]
    self._shard_ends = np.cumsum(shard_records)
    if len(stored) != self.num_documents or records.sum() != self._shard_ends[-1]:
      raise UserError(
        f"{self._files.address}/{split}.tokens.npy does not match the manifest; run "
        "`jaxgpt data` again"
      )
    self.labels: Any = None
    self.second: Any = None
    self._entries: Any = None
    if self.kind == "classification":
      self.labels = self._sidecar("labels")
    if self.kind in shards.WITH_SECOND:
      self.second = self._sidecar("second")
    if self.kind in shards.ENTRIES:
      name = shards.ENTRIES[self.kind]
      self._entries = self._sidecar(name)
      self._offsets = self._sidecar(shards.offsets_of(name)).astype(np.int64)

  def number_classes(self, names: Sequence[str], where: str) -> None:
    """Numbers the classes as a model does. Does nothing if the labels are numbers.

    Args:
      names: Names of the model's classes, in the order of its outputs.
      where: Name of the data, for an error.

    Raises:
      UserError: A class of the data is not among them.
    """
    if self.label_names:
      numbers = label_numbers.numbering(self.label_names, names, where)
      if self.labels is not None:
        self.labels = np.array(numbers, np.float64)[self.labels.astype(np.int64)]
      elif self.kind == "multi_label":
        self._entries = np.array(numbers, np.int32)[self._entries]
      else:
        classes = np.array(numbers, np.int32)[self._entries[:, 1]]
        self._entries = np.stack((self._entries[:, 0], classes), axis=1)
      self.label_names = list(names)

  def trained(self, doc: int) -> np.ndarray | None:
    """Ranges (start, end) of the stored tokens of a document that are trained on.

    Returns:
      int32 [ranges, 2], or None if all but the first token are.
    """
    return self._of("trained", doc) if shards.ENTRIES.get(self.kind) == "trained" else None

  def classes(self, doc: int) -> np.ndarray:
    """The classes of a document of kind multi_label, int32 [L]."""
    return self._of("labels", doc)

  def tags(self, doc: int) -> np.ndarray:
    """(stored token, class) of the first token of each word of a document of kind tagging.

    Returns:
      int32 [words, 2].
    """
    return self._of("tags", doc)

  def answers(self, doc: int) -> np.ndarray:
    """Ranges (start, end) of the stored tokens of the answers to a question.

    Returns:
      int32 [answers, 2]. Without a row if the passage does not answer it.
    """
    return self._of("answers", doc)

  def _of(self, name: str, doc: int) -> np.ndarray:
    assert shards.ENTRIES.get(self.kind) == name, f"data of kind {self.kind} has no {name}"
    return self._entries[self._offsets[doc] : self._offsets[doc + 1]]

  def first_trained(self) -> np.ndarray:
    """The first stored token of each document that is trained on: int64 [num_documents].

    It is beyond the end of a document of which nothing is.
    """
    if shards.ENTRIES.get(self.kind) != "trained":
      return np.ones(self.num_documents, np.int64)
    out = self.lengths + 1
    some = np.flatnonzero(np.diff(self._offsets))
    out[some] = self._entries[self._offsets[some], 0]
    return out

  def _sidecar(self, name: str) -> np.ndarray:
    path = self._sidecar_path(f"{name}.npy")
    try:
      return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as e:
      raise UserError(f"{path} can't be read ({e}); run `jaxgpt data` again") from e

  def _sidecar_path(self, name: str) -> Any:
    return self._files.get(self._sidecars[f"{self.split}.{name}"])

  def source_name(self, doc: int) -> str:
    """The origin of a document: 'folder/file.txt', 'folder/file.jsonl:12'."""
    start, end = np.load(self._sidecar_path("sources.npy"), mmap_mode="r")[doc : doc + 2]
    with self._sidecar_path("sources.txt").open("rb") as f:
      f.seek(int(start))
      return os.fsdecode(f.read(int(end - start) - 1))

  def source_names(self, docs: Sequence[int]) -> list[str]:
    """The origins of documents, see `source_name`. Reads the offsets once."""
    ends = np.load(self._sidecar_path("sources.npy"), mmap_mode="r")
    out = []
    with self._sidecar_path("sources.txt").open("rb") as f:
      for doc in docs:
        start, end = int(ends[doc]), int(ends[doc + 1])
        f.seek(start)
        out.append(os.fsdecode(f.read(end - start - 1)))
    return out

  def read(self, doc: int, start: int, length: int) -> np.ndarray:
    """Reads the stored tokens [start, start + length) of a document, in the stored dtype.

    Args:
      doc: Document, in [0, num_documents).
      start: First token. The document has lengths[doc] + 1 tokens.
      length: Number of tokens.

    Raises:
      IndexError: The range is not in the document.
    """
    return self.read_many([doc], [start], [length])[0]

  def read_many(self, docs: ArrayLike, starts: ArrayLike, lengths: ArrayLike) -> list[np.ndarray]:
    """Reads many ranges with one call per shard, which is several times faster than `read`.

    Args:
      docs: [N]. See `read`.
      starts: [N].
      lengths: [N].

    Returns:
      N read-only arrays.

    Raises:
      IndexError: A range is not in its document.
      UserError: A token has no row in the model's embedding, see `rows`.
    """
    docs, starts, lengths = (np.asarray(x, np.int64) for x in (docs, starts, lengths))
    if not len(docs):
      return []
    ends = starts + lengths
    if (
      docs.min() < 0
      or docs.max() >= self.num_documents
      or starts.min() < 0
      or lengths.min() < 0
      or (ends > self.lengths[docs] + 1).any()
    ):
      raise IndexError(f"a range outside the {self.num_documents} documents of {self.split}")
    first = starts // self._record_tokens
    # A document is stored in records of `record_tokens` tokens; a range covers one or more of them.
    # An empty range still reads one record.
    counts = np.maximum(ends - 1, starts) // self._record_tokens - first + 1
    offsets = np.cumsum(counts) - counts
    within = np.arange(counts.sum()) - np.repeat(offsets, counts)
    records = self._records(np.repeat(self._first_record[docs] + first, counts) + within)
    out = []
    for offset, count, skip, length in zip(
      offsets.tolist(),
      counts.tolist(),
      (starts - first * self._record_tokens).tolist(),
      lengths.tolist(),
    ):
      if count == 1:
        out.append(np.frombuffer(records[offset], self._dtype, length, skip * self._dtype.itemsize))
      else:
        joined = np.frombuffer(b"".join(records[offset : offset + count]), self._dtype)
        out.append(joined[skip : skip + length])
    if self.rows is not None:
      self._check_rows(self.rows, docs.tolist(), out)
    return out

  def _check_rows(self, rows: int, docs: Sequence[int], tokens: Sequence[np.ndarray]) -> None:
    for doc, ids in zip(docs, tokens, strict=True):
      largest = int(ids.max(initial=0))
      if largest >= rows:
        raise UserError(
          f"document {doc} of the {self.split} split ({self.source_name(doc)}) uses token "
          f"{largest}, for which the model has no row of its embedding (model.vocab_size={rows}); "
          "prepare the data without that token"
        )

  def _records(self, keys: np.ndarray) -> list[bytes]:
    """Reads records by their index in the split, shard by shard."""
    shard_of = np.searchsorted(self._shard_ends, keys, side="right")
    out = [b""] * len(keys)
    for shard in np.unique(shard_of).tolist():
      places = np.nonzero(shard_of == shard)[0]
      first = self._shard_ends[shard - 1] if shard else 0
      records = self._read_shard(shard, (keys[places] - first).tolist())
      for place, record in zip(places.tolist(), records):
        out[place] = record
    return out

  def _read_shard(self, shard: int, keys: list[int]) -> list[bytes]:
    """Reads records of a shard, whose chunks have checksums."""
    try:
      return self._reader(shard).read(keys)
    except UserError:
      raise
    except Exception as e:  # ArrayRecord raises what Riegeli, zstd and the file system give it
      name = self.manifest["splits"][self.split]["shards"][shard]["name"]
      raise UserError(
        f"{self._files.address}/{name} can't be read ({type(e).__name__}: {first_line(e, 160)}): "
        "the prepared folder is damaged; `jaxgpt data verify` shows which files are"
      ) from e

  def _reader(self, shard: int) -> Any:
    entry = self.manifest["splits"][self.split]["shards"][shard]
    return _readers.get(str(self._files.get(entry)), self.digest)
