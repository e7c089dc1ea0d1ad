"""A split in memory: examples that are not stored, in the form in which layouts read a split."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxgpt.text.tokenizers.encoded import Encoded


class MemorySplit:
  """Encoded examples with the attributes of `source.Split` that layouts read.

  A layout then cuts and pads them as it does in training.
  """

  def __init__(self, encoded: Sequence[Encoded], kind: str, label_names: Sequence[str] = ()):
    """Args: encoded: The examples, in the order of their numbers."""
    self.kind, self.label_names = kind, list(label_names)
    self.num_documents = len(encoded)
    self._encoded = encoded
    self.lengths = np.array([len(e.ids) - 1 for e in encoded], np.int64)
    self.second = np.array([e.second or 0 for e in encoded], np.uint32)
    self.labels = np.array([0 if e.label is None else e.label for e in encoded], np.float64)

  def trained(self, doc: int) -> np.ndarray | None:
    """See `source.Split`."""
    return self._encoded[doc].trained

  def classes(self, doc: int) -> np.ndarray:
    """See `source.Split`."""
    return self._entries(self._encoded[doc].labels)

  def tags(self, doc: int) -> np.ndarray:
    """See `source.Split`."""
    return self._entries(self._encoded[doc].tags)

  def answers(self, doc: int) -> np.ndarray:
    """See `source.Split`."""
    return self._entries(self._encoded[doc].answers)

  def _entries(self, found: np.ndarray | None) -> np.ndarray:
    assert found is not None, f"data of kind {self.kind} lacks them"
    return found

  def read_many(self, docs: ArrayLike, starts: ArrayLike, lengths: ArrayLike) -> list[np.ndarray]:
    """See `source.Split`."""
    ranges = zip(*(np.asarray(x).tolist() for x in (docs, starts, lengths)), strict=True)
    return [self._encoded[doc].ids[start : start + length] for doc, start, length in ranges]
