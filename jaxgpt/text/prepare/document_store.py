"""Cleaned documents between reading and tokenizing: blocks of documents, and an index.

    FOLDER/documents.arrayrecord    pickled lists of documents, a few hundred kB each, zstd
    FOLDER/documents.npy            INDEX [documents]
    FOLDER/split.txt                the split of all documents, or empty: `splits_of` decides
    FOLDER/blocks.npy               int64 [blocks + 1]; block b holds documents [b] to [b + 1]

The format is private to one run, so documents are pickled: pickle is fast, takes any field, and
reads no file that came from somewhere else.
"""

import hashlib
import itertools
import pathlib
import pickle
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
from array_record.python import array_record_module

from jaxgpt.text.prepare import splits
from jaxgpt.text.readers.documents import Document

# key: the first 48 bits of the salted hash of the text (of the group, if the document has one),
# which choose its split. digest: the next 128 bits of the text's hash, equal for equal texts only.
# bytes: UTF-8 bytes of the text.
INDEX = np.dtype([("key", "<u8"), ("digest", "<u8", (2,)), ("bytes", "<u8")])
_BLOCK_BYTES = 1 << 18
_SPLIT = "split.txt"
_NUMBERS = {"train": 0, "validation": 1, "test": 2}  # of `shards.SPLITS`
_READ_BLOCKS = 8
_SHORT = 1 << 16  # bytes of a text that is hashed in one call
_LONG_BLOCK = 1 << 20  # bytes of text: such a block is read on its own
_WRITER_OPTIONS = "group_size:1,zstd:1"
_READER_OPTIONS = "readahead_buffer_size:0"


class Writer:
  """Writes documents in their order. A context manager."""

  def __init__(self, folder: pathlib.Path, salt: str, split: str = ""):
    """Starts an empty store.

    Args:
      folder: An existing folder.
      salt: Text that the hashes depend on.
      split: The split of all documents, or '' if their hashes choose it.
    """
    (folder / _SPLIT).write_text(split, encoding="utf-8")
    self._folder, self._salt = folder, salt.encode() + b"\0"
    self._writer = array_record_module.ArrayRecordWriter(
      str(folder / "documents.arrayrecord"), _WRITER_OPTIONS
    )
    self._index: list[np.ndarray] = []  # of the blocks written
    self._ends = [0]
    self._block: list[tuple] = []
    self._hashes: list[bytes] = []  # of the block's documents: salted SHA-256 of their texts
    self._keys: list[bytes] = []  # and of what chooses their splits
    self._sizes: list[int] = []
    self._block_bytes = 0

  def add(self, document: Document) -> int:
    """Appends a document and returns the UTF-8 bytes of its text."""
    data = document.text.encode()
    size = len(data)
    if size >= _BLOCK_BYTES and self._block:
      self._end_block()  # a long document is alone in its block
    if size < _SHORT:
      digest = hashlib.sha256(self._salt + data).digest()
    else:
      digest = _digest(self._salt, data)
    self._hashes.append(digest)
    if document.group is None:
      self._keys.append(digest)
    else:
      self._keys.append(hashlib.sha256(self._salt + document.group.encode()).digest())
    del data  # a document may be long
    self._sizes.append(size)
    self._block.append(tuple(document))
    self._block_bytes += size
    if self._block_bytes >= _BLOCK_BYTES:
      self._end_block()
    return size

  def _end_block(self) -> None:
    self._writer.write(pickle.dumps(self._block, protocol=5))
    self._index.append(self._indexed())
    self._ends.append(self._ends[-1] + len(self._block))
    self._block, self._block_bytes = [], 0
    self._hashes, self._keys, self._sizes = [], [], []

  def _indexed(self) -> np.ndarray:
    """The index of the block's documents."""
    index = np.empty(len(self._block), INDEX)
    hashes = np.frombuffer(b"".join(self._hashes), np.uint8).reshape(-1, 32)
    key = np.zeros((len(index), 8), np.uint8)
    key[:, 2:] = np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, 32)[:, :6]
    index["key"] = key.view(">u8")[:, 0]
    index["digest"] = np.ascontiguousarray(hashes[:, 6:22]).view("<u8")
    index["bytes"] = self._sizes
    return index

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if kind is None and self._block:
      self._end_block()
    self._writer.close()
    np.save(self._folder / "documents.npy", np.concatenate([*self._index, np.empty(0, INDEX)]))
    np.save(self._folder / "blocks.npy", np.array(self._ends, np.int64))


def _digest(salt: bytes, data: bytes) -> bytes:
  """The SHA-256 of salt + data, without their concatenation."""
  found = hashlib.sha256(salt)
  found.update(data)
  return found.digest()


class Store:
  """The documents that a `Writer` wrote.

  Attributes:
    index: INDEX [documents].
    split: The split of all documents, or ''.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder = pathlib.Path(folder)
    self.index = np.load(self._folder / "documents.npy")
    self._ends = np.load(self._folder / "blocks.npy")
    self.split = (self._folder / _SPLIT).read_text(encoding="utf-8")

  def splits(self, shares: splits.Shares) -> np.ndarray:
    """The split of each document: uint8 [documents], numbers of `shards.SPLITS`."""
    if self.split:
      return np.full(len(self), _NUMBERS[self.split], np.uint8)
    return splits_of(self.index, shares)

  def __len__(self) -> int:
    return len(self.index)

  def __iter__(self) -> Iterator[Document]:
    """All documents in order."""
    for _, documents in self.blocks():
      yield from documents

  def blocks(self) -> Iterator[tuple[int, list[Document]]]:
    """All documents in order, a few at a time: (number of the first, documents)."""
    yield from zip(self._ends.tolist(), self._blocks(range(len(self._ends) - 1)))

  def take(self, numbers: np.ndarray | Sequence[int]) -> Iterator[Document]:
    """The documents of ascending numbers."""
    numbers = np.asarray(numbers, np.int64)
    block_of = np.searchsorted(self._ends, numbers, side="right") - 1
    blocks = np.unique(block_of)
    for block, documents in zip(blocks.tolist(), self._blocks(blocks.tolist())):
      for number in numbers[block_of == block].tolist():
        yield documents[number - int(self._ends[block])]

  def _blocks(self, blocks: Sequence[int]) -> Iterator[list[Document]]:
    if not len(blocks):
      return
    reader = array_record_module.ArrayRecordReader(
      str(self._folder / "documents.arrayrecord"), options=_READER_OPTIONS
    )
    try:
      for numbers in self._grouped(blocks):
        records = reader.read(numbers)
        records.reverse()
        while records:  # a record may be long: it is gone before its documents are used
          documents = list(itertools.starmap(Document, pickle.loads(records.pop())))
          yield documents
          del documents
    finally:
      reader.close()

  def _grouped(self, blocks: Sequence[int]) -> Iterator[list[int]]:
    """Blocks to read in one call: several, but not together with one that has a long document."""
    sizes: np.ndarray = np.add.reduceat(self.index["bytes"], self._ends[:-1])
    group: list[int] = []
    for block in blocks:
      if group and (len(group) == _READ_BLOCKS or sizes[block] > _LONG_BLOCK):
        yield group
        group = []
      group.append(block)
      if sizes[block] > _LONG_BLOCK:
        yield group
        group = []
    if group:
      yield group


def splits_of(index: np.ndarray, shares: splits.Shares) -> np.ndarray:
  """The split of each document: 0 train, 1 validation, 2 test (`shards.SPLITS`).

  The hash, as a number in [0, 1), chooses the split:

      0       test      test + validation                                   1
      | test  | validation   | train                                        |

  So a larger share only moves documents out of train, and a document stays where it is when the
  corpus grows.

  Args:
    index: INDEX [documents].
    shares: The shares of validation and test.

  Returns:
    uint8 [documents].
  """
  key, (validation, test) = index["key"] / (1 << 48), shares
  return np.where(key < test, 2, np.where(key < test + validation, 1, 0)).astype(np.uint8)
