"""A split of a prepared folder, with random access to any piece of any document."""

import collections
import os
import threading

import numpy as np
from array_record.python import array_record_module
from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.storage import buckets
from jaxgpt.text.prepare import shards

# A reader ahead of the caller is of no use to random access.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_OPEN_READERS = 128  # shards that are open at once, over all splits of a process


class _Readers:
  """Open shards, least recently used first; one that is pushed out closes when its reads end."""

  def __init__(self, limit):
    self._limit, self._lock = limit, threading.Lock()
    self._open = collections.OrderedDict()  # (path, version) -> reader

  def get(self, path, version):
    """The reader of a file; `version` tells files apart that had the same name in turn."""
    key = path, version
    with self._lock:
      reader = self._open.get(key)
      if reader is None:
        # Not ArrayRecordDataSource: its __getitems__ starts a thread pool for each call, which
        # takes five times as long as the reading.
        reader = self._open[key] = array_record_module.ArrayRecordReader(
          path, options=_READER_OPTIONS, file_reader_buffer_size=32_768
        )
        if len(self._open) > self._limit:
          self._open.popitem(last=False)
      else:
        self._open.move_to_end(key)
    return reader


_readers = _Readers(_OPEN_READERS)


def open_split(folder, split):
  """Opens one split of what `jaxgpt data` wrote.

  Checks the manifest, that each shard and sidecar is there with the right size, and that the
  lengths agree with the shards; opens no shard.

  Args:
    folder: the prepared folder.
    split: 'train', 'validation' or 'test'.

  Returns:
    A Split.

  Raises:
    UserError: no such split, it has no document, or the folder is damaged (names the file).
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
  files = entry["shards"] + entry["sidecars"]
  sizes = buckets.sizes(folder, [file["name"] for file in files])
  for file in files:
    size = sizes.get(file["name"])
    if size != file["size"]:
      found = "is missing" if size is None else f"has {size} bytes instead of {file['size']}"
      raise UserError(
        f"{epath.Path(folder) / file['name']} {found}: the prepared folder is "
        "damaged; run `jaxgpt data` again"
      )
  return Split(folder, split, manifest)


class Split:
  """Documents of one split. Safe to share between threads, and picklable.

  Attributes:
    lengths: int64 [num_documents], predictions (stored tokens - 1) of each document.
    bytes: UTF-8 bytes of the split's texts, which bits per byte are counted over.
    kind: of the data, one of `examples.KINDS`.
    label_names: names of the classes, in their order; [] where labels are numbers.
    labels: classification: float64 [num_documents], a class's number or a value; else None.
    second: classification: uint32 [num_documents], the stored token at which the second text of
      a pair starts, 0 where there is one text; else None.
    num_documents: documents.
    manifest: the folder's manifest.
    digest: its sha256.
  """

  def __init__(self, folder, split, manifest):
    """Use `open_split`, which checks what this takes for granted."""
    self.split, self.manifest, self.digest = split, manifest, manifest["digest"]
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
    self.labels = self.second = self._trained = None
    if self.kind == "classification":
      self.labels, self.second = self._sidecar("labels"), self._sidecar("second")
    elif self.kind in shards.WITH_RANGES:
      self._trained = self._sidecar("trained")
      self._trained_offsets = self._sidecar("trained_offsets").astype(np.int64)

  def trained(self, doc):
    """Ranges (start, end) of the stored tokens of document `doc` that are predicted.

    Returns:
      int32 [ranges, 2]; None where all are but the first.
    """
    if self._trained is None:
      return None
    return self._trained[self._trained_offsets[doc] : self._trained_offsets[doc + 1]]

  def _sidecar(self, name):
    path = self._sidecar_path(f"{name}.npy")
    try:
      return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as e:
      raise UserError(f"{path} can't be read ({e}); run `jaxgpt data` again") from e

  def _sidecar_path(self, name):
    return self._files.get(self._sidecars[f"{self.split}.{name}"])

  def source_name(self, doc):
    """Where document `doc` came from: 'folder/file.txt', 'folder/file.jsonl:12'."""
    start, end = np.load(self._sidecar_path("sources.npy"), mmap_mode="r")[doc : doc + 2]
    with self._sidecar_path("sources.txt").open("rb") as f:
      f.seek(int(start))
      return os.fsdecode(f.read(int(end - start) - 1))

  def read(self, doc, start, length):
    """Stored tokens [start, start + length) of document `doc`, in the stored dtype.

    Args:
      doc: in [0, num_documents).
      start, length: within the document's lengths[doc] + 1 stored tokens.

    Raises:
      IndexError: a piece that is not in the document.
    """
    return self.read_many([doc], [start], [length])[0]

  def read_many(self, docs, starts, lengths):
    """`read` for many pieces, with one call a shard, which is several times faster.

    Args:
      docs, starts, lengths: equally long sequences of integers, as `read` takes one of each.

    Returns:
      A list of read-only arrays.
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
      raise IndexError(f"a piece outside the {self.num_documents} documents of {self.split}")
    first = starts // self._record_tokens
    # An empty piece still reads the record it is at.
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
    return out

  def _records(self, keys):
    """Records by their number in the split, read shard by shard."""
    shard_of = np.searchsorted(self._shard_ends, keys, side="right")
    out = [None] * len(keys)
    for shard in np.unique(shard_of).tolist():
      places = np.nonzero(shard_of == shard)[0]
      first = self._shard_ends[shard - 1] if shard else 0
      reader = self._reader(shard)
      for place, record in zip(places.tolist(), reader.read((keys[places] - first).tolist())):
        out[place] = record
    return out

  def _reader(self, shard):
    entry = self.manifest["splits"][self.split]["shards"][shard]
    return _readers.get(str(self._files.get(entry)), self.digest)
