"""Masking: which tokens a masked language model predicts, and which input replaces them."""

from typing import NamedTuple

import ml_collections
import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers.base import Tokenizer


class Masking(NamedTuple):
  """How rows are masked (BERT, arXiv:1810.04805, section 3.1).

  Attributes:
    rate: Share of the tokens that are chosen for prediction.
    replace: Share of the chosen tokens that become the mask.
    random: Share of the chosen tokens that become a random ordinary token. The rest stay.
    mask_id: Token id of the mask.
    ordinary: int32 ids that a random token is drawn from.
    is_special: bool [V], True for ids that are never chosen.
    joins: bool [2, V]. A token with joins[1] continues the word of a preceding token with
      joins[0] and is chosen together with it. None: each token is a word.
    key: Integer seed of the draws, in addition to the row's position.
  """

  rate: float
  replace: float
  random: float
  mask_id: int
  ordinary: np.ndarray
  is_special: np.ndarray
  joins: np.ndarray | None
  key: int

  def __call__(
    self, tokens_T: np.ndarray, segment_ids_T: np.ndarray, position: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Masks one row.

    The draws are raw words of a Philox generator with the key (seed, position), which are the same
    in every version of NumPy. So a row is masked equally on any host, and differently in each
    epoch. With whole words, all tokens of a word use the draw of its first token.

    Args:
      tokens_T: Token ids, which are not changed.
      segment_ids_T: 0 in padding.
      position: The row's global index.

    Returns:
      (masked tokens_T, bool chosen_T).
    """
    bits = np.random.Philox(key=np.array([self.key, position], np.uint64))
    draws = bits.random_raw(len(tokens_T))
    if self.joins is not None:
      draws = draws[self._word_starts(tokens_T, segment_ids_T)]
    chosen_T = (draws < _threshold(self.rate)) & (segment_ids_T > 0) & ~self.is_special[tokens_T]
    at = np.nonzero(chosen_T)[0]
    fate, other = bits.random_raw(2 * len(at)).reshape(2, -1)
    masked_T = tokens_T.copy()
    masked_T[at[fate < _threshold(self.replace)]] = self.mask_id
    swapped = (fate >= _threshold(self.replace)) & (fate < _threshold(self.replace + self.random))
    masked_T[at[swapped]] = self.ordinary[other[swapped] % np.uint64(len(self.ordinary))]
    return masked_T, chosen_T

  def _word_starts(self, tokens_T: np.ndarray, segment_ids_T: np.ndarray) -> np.ndarray:
    """The position at which the word of each position begins."""
    assert self.joins is not None
    joined = self.joins[0][tokens_T[:-1]] & self.joins[1][tokens_T[1:]]
    joined &= segment_ids_T[1:] == segment_ids_T[:-1]
    places = np.arange(len(tokens_T))
    return np.maximum.accumulate(np.where(np.concatenate(([False], joined)), 0, places))


def _threshold(share: float) -> np.uint64:
  """The number below which a 64-bit draw falls with probability `share`."""
  return np.uint64(min(int(share * 2**64), 2**64 - 1))


def make(
  c_objective: ml_collections.ConfigDict,
  tokenizer: Tokenizer,
  seed: int,
  rows: int | None = None,
) -> Masking:
  """Makes the masking of a config.

  Args:
    c_objective: The config's `objective` section.
    tokenizer: The tokenizer, whose special tokens are never masked.
    seed: Seed of the draws, any integer.
    rows: Rows of the model's embedding. Tokens without one are never drawn.

  Raises:
    UserError: The tokenizer has no mask token.
  """
  if tokenizer.mask_id is None:
    raise UserError(
      "objective.name='masked_lm' needs a mask token, which this tokenizer "
      f"({tokenizer.kind}) lacks; prepare the data with --tokenizer=sentencepiece:SIZE, "
      "--tokenizer=bytes or the tokenizer of a masked language model"
    )
  is_special = np.zeros(tokenizer.vocab_size, bool)
  specials = [
    *tokenizer.special_ids.values(),
    tokenizer.bos_id,
    tokenizer.eos_id,
    tokenizer.mask_id,
    tokenizer.pad_id,
    tokenizer.unk_id,
  ]
  is_special[[i for i in specials if i is not None]] = True
  ordinary = np.nonzero(~is_special[:rows])[0].astype(np.int32)
  key = np.random.SeedSequence(seed % 2**64).generate_state(1, np.uint64)[0]
  joins = word_joins(tokenizer, is_special) if c_objective.mask_whole_words else None
  return Masking(
    c_objective.mask_rate,
    c_objective.mask_replace,
    c_objective.mask_random,
    tokenizer.mask_id,
    ordinary,
    is_special,
    joins,
    int(key),
  )


def word_joins(tokenizer: Tokenizer, is_special: np.ndarray) -> np.ndarray:
  """Finds the tokens that share a word with their neighbour, from the text they decode to.

  A word is a run of letters, digits, underscores and incomplete characters (single bytes).

  Returns:
    bool [2, V]: whether a token ends within a word, and whether it begins within one.
  """
  joins = np.zeros((2, tokenizer.vocab_size), bool)
  inside = lambda c: c.isalnum() or c in "_\ufffd"
  for i in np.nonzero(~is_special)[0].tolist():
    text = tokenizer.decode([i])
    if text:
      joins[:, i] = inside(text[-1]), inside(text[0])
  return joins
