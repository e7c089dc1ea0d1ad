"""Words as tokens: the tokens of a text that is given in words, and the first token of each word.

The words are joined by single spaces and encoded as one text, so their tokens are those of running
text. A word has the tokens that cover at least one of its characters:

    words      | Jim  |   | Clark's   |          ids     <s> Jim ▁Clark 's ▁won </s>
    tokens     | Jim  | ▁Clark  | 's  |          firsts       1      2         4

`jaxgpt data` and `jaxgpt predict` both encode words here.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxgpt.text.readers.documents import Document
from jaxgpt.text.readers.fields import UNALIGNED
from jaxgpt.text.tokenizers.base import Tokenizer
from jaxgpt.text.tokenizers.encoded import Encoded, Refused, located
from jaxgpt.text.tokenizers.labels import Numbering

NO_TOKEN = -1


class Words(NamedTuple):
  """The stored tokens of some words.

  Attributes:
    ids: int32 [S], with bos and eos.
    firsts: int32 [W], the index into `ids` of each word's first token, in rising order. `NO_TOKEN`
      for a word without a token of its own: its characters mean nothing to the tokenizer, or its
      only token belongs to the word before it too.
  """

  ids: np.ndarray
  firsts: np.ndarray


def encode(texts: Sequence[Sequence[str]], tokenizer: Tokenizer) -> list[Words]:
  """Encodes texts that are given in words.

  Args:
    texts: The words of each text.
    tokenizer: The tokenizer.

  Raises:
    EncodingError: The tokenizer fails on one of the texts.
  """
  tokenized = located([" ".join(words) for words in texts], tokenizer)
  bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
  out = []
  for words, tokens in zip(texts, tokenized, strict=True):
    ends = np.array(list(itertools.accumulate(len(word) + 1 for word in words)), np.int64) - 1
    starts = ends - np.array([len(word) for word in words], np.int64)
    firsts = _first_tokens(starts, ends, tokens.starts, tokens.ends)
    ids = np.concatenate((bos, tokens.ids, eos)).astype(np.int32)
    out.append(Words(ids, np.where(firsts == NO_TOKEN, firsts, firsts + 1).astype(np.int32)))
  return out


def _first_tokens(
  starts_W: np.ndarray, ends_W: np.ndarray, starts_S: np.ndarray, ends_S: np.ndarray
) -> np.ndarray:
  """The first token of each word, from the ranges of words and tokens in the text: int64 [W]."""
  if not len(starts_S):
    return np.full(len(starts_W), NO_TOKEN)
  # Tokens that end before the word begins are not its own. The end of a token never falls.
  firsts = np.searchsorted(np.maximum.accumulate(ends_S), starts_W, side="right")
  taken = -1
  for word, first in enumerate(firsts.tolist()):
    first = max(first, taken + 1)
    if first < len(starts_S) and starts_S[first] < ends_W[word]:
      firsts[word] = taken = first
    else:
      firsts[word] = NO_TOKEN
  return firsts


def encode_documents(
  documents: Sequence[Document], tokenizer: Tokenizer, numbering: Numbering
) -> list[list[Encoded] | Refused]:
  """Encodes documents of kind tagging.

  Args:
    documents: Documents with the fields `words` and `tags`.
    tokenizer: The tokenizer.
    numbering: The numbers of the tags.

  Returns:
    For each document its encoded form, or the error of one with a word that has no token.

  Raises:
    UserError: A tag is not among the numbered ones.
  """
  out: list[list[Encoded] | Refused] = []
  encoded = encode([document.fields["words"] for document in documents], tokenizer)
  for document, (ids, firsts) in zip(documents, encoded, strict=True):
    words, tags = document.fields["words"], document.fields["tags"]
    without = np.flatnonzero(firsts == NO_TOKEN)
    if len(without):
      word = words[without[0]]
      why = f"word {without[0] + 1} of {len(words)}, {word[:40]!r}, has no token of its own"
      out.append(Refused(UNALIGNED, why))
      continue
    numbers = [numbering.of(tag, document.source, "tags") for tag in tags]
    out.append([Encoded(ids, tags=np.stack((firsts, numbers), axis=1).astype(np.int32))])
  return out
