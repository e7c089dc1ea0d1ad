"""Training documents that are nearest to a text, by the token n-grams that they share.

All tokens of a split are read once, some documents at a time, so memory holds no more than a block
of them and the best documents so far. Every shared n-gram is found: hashes only choose candidates,
whose tokens are then compared. The result depends on nothing but the text and the data.

T tokens of the text, B tokens of a block, N tokens of an n-gram.
"""

import heapq
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jaxgpt.data import source

BLOCK = 1 << 20  # tokens that are read at a time
_PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication loses no bits


class Near(NamedTuple):
  """A document that shares n-grams with the text.

  Attributes:
    doc: Its number in the split.
    shared: Number of n-grams of the text, without repeats, that are in the document.
    length: Tokens of the longest passage that both have.
    text_start: First token of the passage in the text.
    doc_start: First stored token of the passage in the document.
  """

  doc: int
  shared: int
  length: int
  text_start: int
  doc_start: int


class Found(NamedTuple):
  """The result of `search`.

  Attributes:
    nearest: The documents, the one with most shared n-grams first. Of two with the same number, the
      one with the longer passage, then the earlier one.
    documents: Number of documents that share an n-gram.
    grams: Number of n-grams of the text, without repeats.
    covered: How many of them are in some document.
    tokens: Number of tokens that were read.
  """

  nearest: list[Near]
  documents: int
  grams: int
  covered: int
  tokens: int


def search(
  split: source.Split,
  text_T: np.ndarray,
  size: int,
  top: int,
  block: int = BLOCK,
  tell: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
  """Finds the documents of a split that share most n-grams with a text.

  Args:
    split: From `source.open_split`.
    text_T: Token ids, at least `size` of them.
    size: N.
    top: Number of documents to return.
    block: Tokens that are read at a time. A longer document is read in several blocks.
    tell: Called with (tokens read, all tokens) after each block.
  """
  text_T = np.asarray(text_T, np.int64)
  grams_GN = np.unique(_windows(text_T, size), axis=0)
  wanted_G = _hashes(grams_GN)
  order_G = np.argsort(wanted_G, kind="stable")
  sorted_G = wanted_G[order_G]
  best: list[tuple[int, int, int, Near]] = []
  covered_G = np.zeros(len(grams_GN), bool)
  total, done, documents = int((split.lengths + 1).sum()), 0, 0
  for docs in _groups(split, block):
    hits = _hits(split, docs, block, (grams_GN, order_G, sorted_G))
    done += int((split.lengths[docs] + 1).sum())
    for doc, places, numbers in hits:
      documents += 1
      shared = np.unique(numbers)
      covered_G[shared] = True
      if len(best) == top and len(shared) < best[0][0]:
        continue  # cannot be among the best, so its passage need not be found
      near = Near(doc, len(shared), *_longest(split, doc, text_T, places, size))
      heapq.heappush(best, (near.shared, near.length, -doc, near))
      del best[: len(best) > top]
      heapq.heapify(best)
    tell(done, total)
  ordered = [entry[-1] for entry in sorted(best, reverse=True)]
  return Found(ordered, documents, len(grams_GN), int(covered_G.sum()), done)


def _windows(ids: np.ndarray, size: int) -> np.ndarray:
  """[B - N + 1, N] of all n-grams. None for a text that is shorter."""
  if len(ids) < size:
    return np.zeros((0, size), ids.dtype)
  return np.lib.stride_tricks.sliding_window_view(ids, size)


def _hashes(windows_BN: np.ndarray) -> np.ndarray:
  """uint64 [B]: polynomials of the tokens, modulo 2^64."""
  out = np.zeros(len(windows_BN), np.uint64)
  for column in range(windows_BN.shape[1]):
    out = out * _PRIME + windows_BN[:, column].astype(np.uint64) + np.uint64(1)
  return out


def _groups(split: source.Split, block: int) -> Iterator[np.ndarray]:
  """Numbers of documents that follow each other, of about `block` tokens together."""
  ends = np.cumsum(split.lengths + 1)
  start = 0
  while start < len(ends):
    before = ends[start - 1] if start else 0
    end = max(int(np.searchsorted(ends, before + block, side="right")), start + 1)
    yield np.arange(start, end)
    start = end


def _hits(
  split: source.Split,
  docs: np.ndarray,
  block: int,
  wanted: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """(document, places [H], numbers of n-grams [H]) for each document that shares an n-gram."""
  grams_GN, order_G, sorted_G = wanted
  size = grams_GN.shape[1]
  stored = split.lengths[docs] + 1
  if len(docs) == 1 and stored[0] > block:  # in overlapping parts
    starts = np.arange(0, max(int(stored[0]) - size + 1, 1), block)
    owners = np.repeat(docs, len(starts))
    lengths = np.minimum(block + size - 1, stored[0] - starts)
  else:
    owners, starts, lengths = docs, np.zeros(len(docs), np.int64), stored
  found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
  parts = zip(owners.tolist(), starts.tolist(), lengths.tolist(), strict=True)
  for doc, start, length in parts:
    windows_BN = _windows(split.read(doc, start, length), size)
    hashes_B = _hashes(windows_BN)
    at_B = np.minimum(np.searchsorted(sorted_G, hashes_B), len(sorted_G) - 1)
    places = np.flatnonzero(sorted_G[at_B] == hashes_B)
    numbers = order_G[at_B[places]]
    same = (windows_BN[places] == grams_GN[numbers]).all(1)
    if same.any():
      found.setdefault(doc, []).append((places[same] + start, numbers[same]))
  for doc, hits in found.items():
    places, numbers = (np.concatenate(part) for part in zip(*hits, strict=True))
    yield doc, places, numbers


def _longest(
  split: source.Split,
  doc: int,
  text_T: np.ndarray,
  places: np.ndarray,
  size: int,
) -> tuple[int, int, int]:
  """(length, start in the text, start in the document) of the longest common passage.

  Args:
    split: The split.
    doc: The document.
    text_T: The text.
    places: [H] where n-grams of the text are in the document.
    size: N.
  """
  # An n-gram may be in the text several times.
  windows: dict[tuple[int, ...], list[int]] = {}
  for start, gram in enumerate(map(tuple, _windows(text_T, size).tolist())):
    windows.setdefault(gram, []).append(start)
  best = (0, 0, 0)
  # {start in the text: length of the passage that ends with the n-gram there}, at the place before.
  open_passages: dict[int, int] = {}
  last = -2
  for place in places.tolist():
    gram = tuple(split.read(doc, place, size).tolist())
    now = {}
    for start in windows[gram]:
      before = open_passages.get(start - 1, size - 1) if place == last + 1 else size - 1
      now[start] = before + 1
      if before + 1 > best[0]:
        best = (before + 1, start - (before + 1 - size), place - (before + 1 - size))
    open_passages, last = now, place
  return best
