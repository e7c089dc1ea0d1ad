"""Encoding by words that were met before: most of a text is a few hundred thousand words.

Where no token of a vocabulary holds a space after something else, a text may be cut before each run
of spaces, and its tokens are those of the parts, end to end. That takes half of the time or less.
"""

import bisect
import itertools
import re
import threading

import numpy as np

_WORDS = re.compile(" *[^ ]+| +")
_LONGEST = 32  # characters of a word that is kept
_MOST = 250_000  # words that are kept: about 50 MB


class WordCache:
  """Texts to ids, like the function that it was given. Safe to share between threads."""

  def __init__(self, encode):
    """Args: encode: function (texts) -> lists of ids, that the cut does not change."""
    self._encode, self._lock = encode, threading.Lock()
    self._numbers = _Numbers()  # word -> its number
    self._starts = np.zeros(1 << 10, np.int64)  # where a word's ids begin in the pool
    self._lengths = np.zeros(1 << 10, np.int64)
    self._pool = np.zeros(1 << 12, np.int32)
    self._used = 0

  def __call__(self, texts):
    """Ids of each text, as int32 arrays."""
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
    cuts = ends[np.cumsum([0, *map(len, words)])].tolist()
    return [ids[start:end] for start, end in itertools.pairwise(cuts)]

  def _learn(self, words):
    """Encodes what is new, the words to keep first: the others' places are those of the next call."""
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


class _Numbers(dict):
  """Words that are kept to numbers; beside them `others`, those of one call.

  In one dict, the others that come and go would make it be built anew every now and then, twice as
  large for a moment.
  """

  others = {}  # noqa: RUF012 (replaced, never changed)

  def __missing__(self, word):
    return self.others[word]


def _is_long(word):
  return len(word) > _LONGEST


def _grown(array, size):
  """An array of at least `size`, with the content of this one."""
  if size <= len(array):
    return array
  out = np.zeros(max(size, 2 * len(array)), array.dtype)
  out[: len(array)] = array
  return out
