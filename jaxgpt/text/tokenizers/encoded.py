"""A stored document, the error of one that cannot be stored, and tokens with their places."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers.base import Tokenizer, Tokens


class Encoded(NamedTuple):
  """One stored document.

  Attributes:
    ids: int32 [S], all stored tokens, including bos and eos.
    trained: int32 [R, 2], ranges (start, end) of the stored tokens that are trained on. None means
      all but the first.
    label: A class index, a float for a regression, or None without label.
    second: Stored token at which the second text of a pair starts, or None if there is one text.
    labels: int32 [L], class indices of a text with any number of labels.
    tags: int32 [W, 2], (stored token, class index) of the first token of each word.
    answers: int32 [A, 2], ranges (start, end) of the stored tokens of each answer.
  """

  ids: np.ndarray
  trained: np.ndarray | None = None
  label: float | None = None
  second: int | None = None
  labels: np.ndarray | None = None
  tags: np.ndarray | None = None
  answers: np.ndarray | None = None


class Refused(UserError):
  """A document that cannot be stored with its labels.

  Attributes:
    rule: Name of the rule that it is counted under.
  """

  def __init__(self, rule: str, why: str):
    super().__init__(why)
    self.rule = rule


def located(texts: Sequence[str], tokenizer: Tokenizer) -> list[Tokens]:
  """Encodes texts, without bos and eos, with the characters that each token stands for.

  Raises:
    EncodingError: The tokenizer fails on one of the texts.
  """
  return tokenizer.encode_rendered(texts, [tokenizer.special_ranges(text) for text in texts])
