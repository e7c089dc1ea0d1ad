"""Words and sentences of a text, in any language, without downloads.

Filters, near-duplicate detection and decontamination count words, so words must be the same on
every machine. A page of rules finds them, without a trained model or a word list.
"""

import functools
import hashlib
import re
from collections.abc import Iterator

import numpy as np

_CHUNK = 1 << 20  # characters whose words are in memory at once

_SIGN = (  # punctuation and symbols, as ranges of a character class
  r"!-/:-@\[-`{-~\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f¡-©«-±´¶-¸»¿×÷"
  r"\u037e\u0387\u055a-\u055f\u0589\u05be\u060c\u061b\u061f"
  r"\u066a-\u066d\u06d4\u0964\u0965\u1360-\u1368\u2010-\u2027\u2030-\u205e"
  r"\u20a0-\u20cf\u2100-\u2bff\u3001-\u3004\u3008-\u3020\u3030\ufe30-\ufe6b\uff01-\uff0f"
  r"\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\U0001f000-\U0001faff"
)
_UNSPACED = (
  r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u302f\u3031-\u30ff"
  r"\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_LETTERS = rf"[^\s{_SIGN}{_UNSPACED}]+"
_LEADS, _JOINS = r"*+./=\\^_|~-", r"'’*+./=\\^_|~-"
_WORD = re.compile(
  rf"[{_LEADS}]*{_LETTERS}(?:[{_JOINS}]{_LETTERS})*|[{_UNSPACED}]"
  rf"|([{_LEADS}])\1*|[{_SIGN}]"
)
_PLAIN_WORD = re.compile(rf"{_LETTERS}(?:['’]{_LETTERS})*|[{_UNSPACED}]")
# A full stop ends a sentence if white space and then no lower-case letter follow.
_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s+[^\sa-z]|\s*$)|[。！？｡।۔؟]+[”’」』）]*|\n+")


def words(text: str) -> list[str]:
  """The words and punctuation marks of a text, in order.

  A word is a run of letters, marks and digits, which may contain single dots, hyphens, slashes and
  the like ('well-known', 'x.y', './a/b'). Brackets, quotes, commas, colons and other signs are
  separate. A run such as '...' or '====' is one. Each character of a script that is written without
  spaces is a word: Han, kana, Thai, Lao, Burmese, Khmer, Tibetan. The result is close to NLTK's
  Treebank rules, with which the thresholds of published filters were chosen.
  """
  return [match[0] for match in _WORD.finditer(text)]


def plain_words(text: str) -> list[str]:
  """The lower-case words of a text without punctuation: 'A b_c, 1.5!' gives a, b, c, 1, 5."""
  return _PLAIN_WORD.findall(text.lower())


def sentence_spans(text: str) -> list[tuple[int, int]]:
  """(start, end) of each sentence, without the white space around it. A newline ends a sentence."""
  spans, start = [], 0
  ends = [match.end() for match in _END.finditer(text)]
  for end in [*ends, len(text)]:
    sentence = text[start:end]
    if sentence.strip():
      spans.append((start + len(sentence) - len(sentence.lstrip()), start + len(sentence.rstrip())))
    start = end
  return spans


def ngram_hashes(text: str, n: int) -> np.ndarray:
  """A 64-bit hash of each n-gram of a text's plain words, the same on every machine.

  Args:
    text: Text of any length. Memory is a few times 8 bytes per word.
    n: Words per n-gram, at least 1.

  Returns:
    uint64 [max(plain words - n + 1, 0)]. Two different n-grams collide with probability 2^-64.
  """
  hashes = np.concatenate(
    [np.fromiter(map(word_hash, plain_words(chunk)), np.uint64) for chunk in _chunks(text)]
  )
  count = len(hashes)
  # hash(w_1 … w_n) = mix(sum_k hash(w_k) * odd_k mod 2^64), for all n-grams at once: n vector
  # additions instead of one hash call per n-gram.
  total = np.zeros(max(count - n + 1, 0), np.uint64)
  for k in range(n if total.size else 0):
    total += hashes[k : k + total.size] * np.uint64(word_hash(f"place {k}") | 1)
  # The sums of neighbours are similar in their low bits; mix as SplitMix64 does.
  total = (total ^ (total >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  total = (total ^ (total >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return total ^ (total >> np.uint64(31))


def _chunks(text: str) -> Iterator[str]:
  """Cuts a text into chunks after a space or newline, never within a word."""
  start = 0
  while len(text) - start > _CHUNK:
    end = start + _CHUNK
    end = 1 + max(text.rfind(" ", start, end), text.rfind("\n", start, end)) or end
    yield text[start:end]
    start = end
  yield text[start:]


@functools.lru_cache(1 << 16)
def word_hash(word: str) -> int:
  """A 64-bit hash of a word, the same on every machine."""
  return int.from_bytes(
    hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
  )
