"""Which tokens of a row a masked language model has to guess, and what it sees instead."""

from typing import NamedTuple

import numpy as np

from jaxgpt.errors import UserError


class Masking(NamedTuple):
  """How rows are masked (BERT, arXiv:1810.04805, section 3.1).

  Attributes:
    rate: share of the tokens that are chosen, to be guessed.
    replace: share of the chosen that become the mask's id.
    random: share of the chosen that become any ordinary token; the others stay as they are.
    mask_id: the mask's id.
    ordinary: int32, ids that a random token is drawn from.
    is_special: bool [V], ids that are never chosen.
    joins: bool [2, V]; a token with joins[1] goes on with the word of a token with joins[0]
      before it, and is chosen with it. None: each token is a word.
    key: an integer that the draws depend on, besides the row's position.
  """

  rate: float
  replace: float
  random: float
  mask_id: int
  ordinary: np.ndarray
  is_special: np.ndarray
  joins: np.ndarray | None
  key: int

  def __call__(self, tokens_T, segment_ids_T, position):
    """Masks one row.

    The draws are those of a Philox generator (its raw words, which no version of NumPy changes)
    whose key is (seed, position): a row is masked alike on whatever host, and anew in each epoch.

    Args:
      tokens_T: ids; not changed.
      segment_ids_T: 0 for padding.
      position: the row's number in the endless sequence of rows.

    Returns:
      (masked tokens_T, chosen_T: bool).
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

  def _word_starts(self, tokens_T, segment_ids_T):
    """For each place the place at which its word begins."""
    joined = self.joins[0][tokens_T[:-1]] & self.joins[1][tokens_T[1:]]
    joined &= segment_ids_T[1:] == segment_ids_T[:-1]
    places = np.arange(len(tokens_T))
    return np.maximum.accumulate(np.where(np.concatenate(([False], joined)), 0, places))


def _threshold(share):
  """A 64-bit draw is below it in `share` of all cases."""
  return np.uint64(min(int(share * 2**64), 2**64 - 1))


def make(c_objective, tokenizer, seed):
  """The masking that the config asks for.

  Args:
    c_objective: the config's `objective` section.
    tokenizer: whose special tokens are left alone.
    seed: of the draws; any integer.

  Raises:
    UserError: the tokenizer has no mask.
  """
  if tokenizer.mask_id is None:
    raise UserError(
      "objective.name='masked_lm' needs a token that stands for a masked one, and the tokenizer "
      f"({tokenizer.kind}) has none; prepare the data with --tokenizer=sentencepiece:SIZE, "
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
  ordinary = np.nonzero(~is_special)[0].astype(np.int32)
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


def word_joins(tokenizer, is_special):
  """Which tokens belong to one word with a neighbour, by what they decode to.

  Words are runs of letters, digits and underscores, and of anything that is no text on its own
  (a byte of a character).

  Returns:
    bool [2, V]: whether a token ends, and whether it begins, in the middle of a word.
  """
  joins = np.zeros((2, tokenizer.vocab_size), bool)
  inside = lambda c: c.isalnum() or c in "_\ufffd"
  for i in np.nonzero(~is_special)[0].tolist():
    text = tokenizer.decode([i])
    if text:
      joins[:, i] = inside(text[-1]), inside(text[0])
  return joins
