"""Layouts with labels on tokens: a class for each word, or the ends of an answer.

B rows of a batch, T positions in a row.
"""

from collections.abc import Sequence

import numpy as np

from jaxgpt.config.keys import training
from jaxgpt.data import packing as packings
from jaxgpt.data import source
from jaxgpt.data.layouts.layout import Batch, Item, each, place, read, zeros
from jaxgpt.text.tokenizers import passages


class TokenClassification:
  """Packed texts with a class on the first token of each word.

  The arrays, all [B, T]:
    tokens, segment_ids, positions: int32, as of `CausalLM`.
    targets: int32. The class of a word at its first token, 0 elsewhere.
    loss_weights: float32. 1 at the first token of each word, 0 elsewhere and in padding.

  `Split.tags` has the tokens of a document's words, so predictions lead back to words.
  """

  predicts_next = False
  predicts_tokens = False

  def index(
    self, split: source.Split, packing: str, seq_len: int
  ) -> tuple[packings.PackIndex, int]:
    """See `Layout`. A text longer than a row continues in further rows, so none is cut off."""
    return packings.PACKINGS[packing](split.lengths + 1, seq_len), 0

  def batch(self, items: Sequence[Item], num_rows: int, seq_len: int) -> Batch:
    """See `Layout`."""
    out = zeros(
      num_rows, seq_len, "tokens", "targets", "segment_ids", "positions", floats=("loss_weights",)
    )
    for i, (split, spans, tokens) in enumerate(read(items, 0)):
      place(out, i, tokens)
      at = 0
      for doc, start, length in each(spans):
        tags = split.tags(doc)
        tags = tags[(tags[:, 0] >= start) & (tags[:, 0] < start + length)]
        places = at + tags[:, 0] - start
        out["targets"][i, places] = tags[:, 1]
        out["loss_weights"][i, places] = 1
        at += length
    return out


class QuestionAnswering:
  """A question and a window of its passage per row, with the ends of the answer.

  The arrays:
    tokens, segment_ids, positions: int32 [B, T]. segment_ids is 1, or 0 in padding.
    token_types: int32 [B, T]. 1 in the passage.
    starts, ends: int32 [B, T]. 1 at the first and at the last token of the first answer, 0
      elsewhere. Both are at the row's first token if the window does not hold the whole answer, or
      if the question has none (SQuAD 2.0, arXiv:1806.03822).
    loss_weights: float32 [B]. 0 for a row of padding.

  `passages.windows` gives the rows. Of a question of more than half a row, the end is cut off.
  """

  predicts_next = False
  predicts_tokens = False

  def __init__(self, overlap: int | None):
    """Args: overlap: Tokens that consecutive windows share. None: `usual_overlap`."""
    self._overlap = overlap

  def index(
    self, split: source.Split, packing: str, seq_len: int
  ) -> tuple[packings.PackIndex, int]:
    """See `Layout`. Each window fills one row, whatever `packing` says."""
    del packing
    overlap = usual_overlap(seq_len) if self._overlap is None else self._overlap
    stored, second = split.lengths + 1, split.second.astype(np.int64)
    rows = passages.windows(stored, second, seq_len, overlap)
    # A row has up to four spans: | question ... | its eos if cut | window ... | the last eos |
    size = second[rows.doc]
    is_cut = (rows.question < size).astype(np.int64)
    start = np.stack((0 * size, size - 1, rows.start, stored[rows.doc] - 1), axis=1).reshape(-1)
    length = np.stack((rows.question - is_cut, is_cut, rows.length, is_cut * 0 + 1), axis=1)
    exists = length.reshape(-1) > 0
    offsets = np.concatenate(([0], np.cumsum(exists)[3::4]))
    doc = np.repeat(rows.doc, 4)
    pack = packings.PackIndex(
      seq_len, offsets, doc[exists], start[exists], length.reshape(-1)[exists]
    )
    return pack, int((np.minimum(second, seq_len // 2) < second).sum())

  def batch(self, items: Sequence[Item], num_rows: int, seq_len: int) -> Batch:
    """See `Layout`."""
    out = zeros(
      num_rows, seq_len, "tokens", "segment_ids", "positions", "token_types", "starts", "ends"
    )
    out["loss_weights"] = np.zeros(num_rows, np.float32)
    for i, (split, (docs, starts, lengths), tokens) in enumerate(read(items, 0)):
      place(out, i, tokens, one=True)
      second = int(split.second[docs[0]])
      out["token_types"][i, : lengths.sum()] = np.repeat(starts >= second, lengths)
      first, last = _answer(split.answers(docs[0]), second, starts, lengths)
      out["starts"][i, first] = out["ends"][i, last] = 1
      out["loss_weights"][i] = 1
    return out


def _answer(
  answers: np.ndarray, second: int, starts: np.ndarray, lengths: np.ndarray
) -> tuple[int, int]:
  """The places in a row of an answer's first and last token, or (0, 0) if it has none.

  Args:
    answers: int32 [A, 2], ranges of stored tokens.
    second: The first stored token of the passage.
    starts, lengths: The row's spans.
  """
  at = 0
  for start, length in zip(starts.tolist(), lengths.tolist()):
    if len(answers) and start >= second:
      low, high = answers[0].tolist()
      if start <= low and high <= start + length:
        return at + low - start, at + high - 1 - start
    at += length
  return 0, 0


def usual_overlap(seq_len: int) -> int:
  """The overlap of windows if the config sets none: a third of a row."""
  return min(seq_len // 3, training.most_overlap(seq_len))
