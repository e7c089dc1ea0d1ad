"""A cache of encoded words: most of any text consists of a few hundred thousand words.

If no token of a vocabulary contains a space after another character, a text may be cut before each
run of spaces, and its tokens are those of the words, concatenated. Looking up the words takes half
of the time or less.

  text       "the cat  sat the"
  words      "the" " cat" "  sat" " the"
  numbers      0      1      2      3          {word: number}
  lengths      1      1      2      1          of each number
  starts       0      1      2      4          of each number in the pool
  pool       [ the | _cat | __ sat | _the ]    the ids of all words, one after the other

One gather with NumPy takes all ids of a batch of texts from the pool.
"""

import bisect
import itertools
import re
import threading
from collections.abc import Callable, Sequence

import numpy as np

_WORDS = re.compile(" *[^ ]+| +")
_LONGEST = 32  # longest word to keep, in characters
_GROUP_CHARS = 1 << 18  # characters cut into words at a time
_MOST = 250_000  # most words to keep: about 50 MB


class WordCache:
  """Encodes texts like the function it was given. Safe to share between threads."""

  def __init__(self, encode: Callable[[Sequence[str]], Sequence[Sequence[int]]]):
    """Args: encode: (texts) -> lists of ids, whose result the cut must not change."""
    self._encode, self._lock = encode, threading.Lock()
    self._numbers = _Numbers()  # word -> its number
    self._starts = np.zeros(1 << 10, np.int64)  # start of a word's ids in the pool
    self._lengths = np.zeros(1 << 10, np.int64)
    self._pool = np.zeros(1 << 12, np.int32)
    self._used = 0

  def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Encodes each text to an int32 array."""
    ids, lengths = self.joined(texts)
    cuts = np.cumsum([0, *lengths.tolist()]).tolist()
    return [ids[start:end] for start, end in itertools.pairwise(cuts)]

  def joined(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encodes texts to one array: (int32 ids of all texts, int64 [texts] ids of each text).

    Takes some texts at a time, as the strings of all words need much more memory than their ids.
    """
    groups: list[list[str]] = [[]]
    chars = 0
    for text in texts:
      if chars > _GROUP_CHARS:
        groups.append([])
        chars = 0
      groups[-1].append(text)
      chars += len(text)
    ids, lengths = zip(*map(self._joined, groups))
    return (ids[0], lengths[0]) if len(ids) == 1 else (np.concatenate(ids), np.concatenate(lengths))

  def _joined(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    words = [_WORDS.findall(text) for text in texts]
    with self._lock:
      self._learn(words)
      numbers = np.fromiter(
        map(self._numbers.__getitem__, itertools.chain.from_iterable(words)), np.int64
      )
      lengths = self._lengths[numbers]
      ends = np.concatenate(([0], np.cumsum(lengths)))
      places = np.repeat(self._starts[numbers] - ends[:-1], lengths)
      places += np.arange(ends[-1])
      ids = self._pool[places]
    return ids, np.diff(ends[np.cumsum([0, *map(len, words)])])

  def _learn(self, words: Sequence[Sequence[str]]) -> None:
    """Encodes the new words, those to keep first. The next call reuses the space of the rest."""
    new = [
      word
      for word in dict.fromkeys(itertools.chain.from_iterable(words))
      if word not in self._numbers
    ]
    if not new:
      return
    new.sort(key=_is_long)
    known = len(self._numbers)
    keep = min(bisect.bisect_right(new, False, key=_is_long), _MOST - known)
    encoded = self._encode(new)
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    ends = self._used + np.cumsum(lengths)
    total = int(ends[-1])
    self._starts = _grown(self._starts, known + len(new))
    self._lengths = _grown(self._lengths, known + len(new))
    self._pool = _grown(self._pool, total)
    self._starts[known : known + len(new)] = ends - lengths
    self._lengths[known : known + len(new)] = lengths
    self._pool[self._used : total] = np.fromiter(
      itertools.chain.from_iterable(encoded), np.int32, total - self._used
    )
    numbers = zip(new, itertools.count(known))
    self._numbers.update(itertools.islice(numbers, keep))
    self._numbers.others = dict(numbers)
    self._used = int(ends[keep - 1]) if keep else self._used


class _Numbers(dict[str, int]):
  """The numbers of the kept words, and in `others` those of the words of one call.

  A single dict with all of them would be rebuilt every now and then because of its deleted entries,
  with twice the memory for a moment.
  """

  others: dict[str, int] = {}  # noqa: RUF012 (replaced, never changed)

  def __missing__(self, word: str) -> int:
    return self.others[word]


def _is_long(word: str) -> bool:
  return len(word) > _LONGEST


def _grown(array: np.ndarray, size: int) -> np.ndarray:
  """An array with the same content and room for at least `size` elements."""
  if size <= len(array):
    return array
  out = np.zeros(max(size, 2 * len(array)), array.dtype)
  out[: len(array)] = array
  return out
