"""Questions on passages as tokens: places of characters, and windows over long passages.

A question and its passage are stored as one document:

    ids     bos  question …  eos  passage …  eos
                                  ^ second

A passage that is too long for a row is read in windows that overlap. Each row has the question:

    row 0   bos  question  eos | passage tokens    0 … 299 | eos
    row 1   bos  question  eos | passage tokens  200 … 499 | eos      (an overlap of 100)

`jaxgpt data` and `jaxgpt predict` both encode questions here, and make the same windows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxgpt.text.readers.documents import Document
from jaxgpt.text.readers.fields import NO_ANSWER
from jaxgpt.text.tokenizers.base import Tokenizer
from jaxgpt.text.tokenizers.encoded import Encoded, Refused, located


class Passage(NamedTuple):
  """The stored tokens of a question and a passage.

  Attributes:
    ids: int32 [S]: bos, question, eos (as many as the tokenizer puts between two texts), passage,
      eos.
    second: Index into `ids` of the passage's first token.
    starts, ends: int [P], the range of each of the passage's tokens in its characters. Token i is
      `ids[second + i]`.
  """

  ids: np.ndarray
  second: int
  starts: np.ndarray
  ends: np.ndarray

  def characters(self, start: int, end: int) -> tuple[int, int]:
    """The range of characters of the stored tokens [start, end), which are the passage's."""
    return int(self.starts[start - self.second]), int(self.ends[end - 1 - self.second])

  def tokens(self, start: int, end: int) -> tuple[int, int] | None:
    """The range of stored tokens that cover some of the characters [start, end), or None."""
    covered = np.flatnonzero((self.ends > start) & (self.starts < end))
    if not len(covered):
      return None
    return int(covered[0]) + self.second, int(covered[-1]) + 1 + self.second


def encode(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[Passage]:
  """Encodes questions with their passages.

  Args:
    pairs: (question, passage) of each. A passage that comes again is encoded once.
    tokenizer: The tokenizer.

  Raises:
    EncodingError: The tokenizer fails on one of the texts.
  """
  passages = list(dict.fromkeys(passage for _, passage in pairs))
  tokenized = dict(zip(passages, located(passages, tokenizer), strict=True))
  questions = tokenizer.encode_batch([question for question, _ in pairs])
  bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
  out = []
  for question, (_, passage) in zip(questions, pairs, strict=True):
    tokens = tokenized[passage]
    before = np.concatenate((bos, question, eos * tokenizer.pair_ends))
    ids = np.concatenate((before, tokens.ids, eos)).astype(np.int32)
    out.append(Passage(ids, len(before), tokens.starts, tokens.ends))
  return out


class Windows(NamedTuple):
  """Rows over questions and passages, those of a document one after the other. All int64 [N].

  Row i holds the stored tokens [0, question) of its document, those of [start, start + length), and
  the document's last. Of a question that is cut, the last stored token before the passage (an eos)
  takes the place of the last one.

  Attributes:
    doc: The document of each row.
    question: Tokens before the passage, with bos and eos.
    start: First stored token of the window.
    length: Tokens of the window.
  """

  doc: np.ndarray
  question: np.ndarray
  start: np.ndarray
  length: np.ndarray


def windows(stored: np.ndarray, second: np.ndarray, seq_len: int, overlap: int) -> Windows:
  """The rows of documents.

  Args:
    stored: int [N], stored tokens of each document.
    second: int [N], where its passage starts.
    seq_len: Tokens of a row. A question has at most half of them.
    overlap: Tokens that consecutive windows share. They must go on by one at least: see
      `config.keys.training.most_overlap`.
  """
  stored, second = np.asarray(stored, np.int64), np.asarray(second, np.int64)
  question = np.minimum(second, seq_len // 2)
  passage = stored - second - 1  # without the last eos
  room = seq_len - question - 1
  step = room - overlap
  count = 1 + -(-np.maximum(passage - room, 0) // step)
  doc = np.repeat(np.arange(len(stored)), count)
  number = np.arange(len(doc)) - np.repeat(np.cumsum(count) - count, count)
  offset = number * step[doc]
  return Windows(
    doc, question[doc], second[doc] + offset, np.minimum(room[doc], passage[doc] - offset)
  )


def encode_documents(
  documents: Sequence[Document], tokenizer: Tokenizer
) -> list[list[Encoded] | Refused]:
  """Encodes documents of kind question_answering.

  Args:
    documents: Documents with the fields `question`, `context` and `answers`.
    tokenizer: The tokenizer.

  Returns:
    For each document its encoded form, or the error of one with an answer that has no token.
  """
  out: list[list[Encoded] | Refused] = []
  pairs = [(document.fields["question"], document.fields["context"]) for document in documents]
  for document, passage in zip(documents, encode(pairs, tokenizer), strict=True):
    found = []
    for answer in document.fields["answers"]:
      start, text = answer["answer_start"], answer["text"]
      found.append((text, passage.tokens(start, start + len(text))))
    without = [text for text, tokens in found if tokens is None]
    if without:
      why = f"answer {without[0][:40]!r} has no token: the tokenizer leaves its characters out"
      out.append(Refused(NO_ANSWER, why))
      continue
    answers = np.array([tokens for _, tokens in found], np.int32).reshape(-1, 2)
    out.append([Encoded(passage.ids, second=passage.second, answers=answers)])
  return out
