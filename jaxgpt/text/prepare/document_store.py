"""Cleaned documents on their way to tokens: blocks of documents, and an index of what they are.

    FOLDER/documents.arrayrecord    pickled lists of documents, a few hundred kB each, zstd
    FOLDER/documents.npy            INDEX [documents]
    FOLDER/blocks.npy               int64 [blocks + 1]; block b holds documents [b] to [b + 1]

This is private to one run, which is why documents are pickled: it is fast, takes any field, and
nobody else's file is ever read.
"""

import hashlib
import pathlib
import pickle

import numpy as np
from array_record.python import array_record_module

from jaxgpt.text.readers import documents as documents_lib

# key: the first 48 bits of the salted hash of the text, which choose its split; digest: the next
# 128, equal for equal texts only; bytes: UTF-8 bytes of the text.
INDEX = np.dtype([("key", "<u8"), ("digest", "<u8", (2,)), ("bytes", "<u8")])
_BLOCK_BYTES = 1 << 18
_READ_BLOCKS = 8
_WRITER_OPTIONS = "group_size:1,zstd:1"
_READER_OPTIONS = "readahead_buffer_size:0"


class Writer:
  """Writes documents in their order. A context manager."""

  def __init__(self, folder, salt):
    """Args: folder: an existing pathlib.Path; salt: a string that the hashes depend on."""
    self._folder, self._salt = folder, salt.encode() + b"\0"
    self._writer = array_record_module.ArrayRecordWriter(
      str(folder / "documents.arrayrecord"), _WRITER_OPTIONS
    )
    self._rows, self._parts, self._ends = [], [], [0]
    self._block, self._block_bytes = [], 0

  def add(self, document):
    """Appends a `read.Document`; returns the UTF-8 bytes of its text."""
    data = document.text.encode()
    found = hashlib.sha256(self._salt + data).digest()
    self._rows.append(
      (
        int.from_bytes(found[:6], "big"),
        (int.from_bytes(found[6:14], "little"), int.from_bytes(found[14:22], "little")),
        len(data),
      )
    )
    self._block.append(tuple(document))
    self._block_bytes += len(data)
    if self._block_bytes >= _BLOCK_BYTES:
      self._end_block()
    return len(data)

  def _end_block(self):
    self._writer.write(pickle.dumps(self._block, protocol=5))
    self._parts.append(np.array(self._rows, INDEX))
    self._ends.append(self._ends[-1] + len(self._block))
    self._block, self._block_bytes, self._rows = [], 0, []

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    if kind is None and self._block:
      self._end_block()
    self._writer.close()
    np.save(self._folder / "documents.npy", np.concatenate([*self._parts, np.empty(0, INDEX)]))
    np.save(self._folder / "blocks.npy", np.array(self._ends, np.int64))


class Store:
  """Documents that a `Writer` wrote.

  Attributes:
    index: INDEX [documents].
  """

  def __init__(self, folder):
    self._folder = pathlib.Path(folder)
    self.index = np.load(self._folder / "documents.npy")
    self._ends = np.load(self._folder / "blocks.npy")

  def __len__(self):
    return len(self.index)

  def __iter__(self):
    """All documents, in order."""
    for documents in self._blocks(range(len(self._ends) - 1)):
      yield from documents

  def take(self, numbers):
    """The documents of these ascending numbers, as an iterator."""
    numbers = np.asarray(numbers, np.int64)
    block_of = np.searchsorted(self._ends, numbers, side="right") - 1
    blocks = np.unique(block_of)
    for block, documents in zip(blocks.tolist(), self._blocks(blocks.tolist())):
      for number in numbers[block_of == block].tolist():
        yield documents[number - int(self._ends[block])]

  def _blocks(self, blocks):
    if not len(blocks):
      return
    reader = array_record_module.ArrayRecordReader(
      str(self._folder / "documents.arrayrecord"), options=_READER_OPTIONS
    )
    try:
      for start in range(0, len(blocks), _READ_BLOCKS):
        for record in reader.read(list(blocks[start : start + _READ_BLOCKS])):
          yield [documents_lib.Document(*fields) for fields in pickle.loads(record)]
    finally:
      reader.close()


def splits_of(index, validation, test):
  """The split of each document: 0 train, 1 validation, 2 test (`shards.SPLITS`), as uint8.

  Args:
    index: INDEX [documents].
    validation, test: the shares of these splits, in [0, 1).
  """
  key = index["key"] / (1 << 48)
  return np.where(key < test, 2, np.where(key < test + validation, 1, 0)).astype(np.uint8)
