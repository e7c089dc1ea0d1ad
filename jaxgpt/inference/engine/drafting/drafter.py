"""What the engine needs of a drafter, and the choice of one."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.engine import programs
from jaxgpt.inference.engine.drafting import model, ngrams
from jaxgpt.inference.engine.drafting.acceptance import Drafts
from jaxgpt.inference.engine.rows import Row
from jaxgpt.run import init_from

NGRAM = "ngram"  # drafts from the text itself


@dataclasses.dataclass(frozen=True)
class Drafting:
  """How tokens are drafted.

  Attributes:
    tokens: Most tokens that are drafted at a time.
    run: The draft model, from `load.load`. None: drafts come from the text itself.
  """

  tokens: int
  run: load.Run | None = None

  def check(self, run: load.Run) -> None:
    """Raises a UserError if the draft model cannot draft for a run."""
    draft = self.run
    if draft is None:
      return
    if not init_from.same_tokens(draft.tokenizer, run.tokenizer):
      raise UserError(
        f"--draft: its tokenizer ({draft.tokenizer.digest[:12]}) is not the run's "
        f"({run.tokenizer.digest[:12]}); draft with a model of the same tokens, or --draft={NGRAM}"
      )
    rows, ids = draft.c.model.vocab_size, run.tokenizer.vocab_size
    if rows < ids:
      raise UserError(
        f"--draft: its embedding has {rows} rows, the run's tokenizer {ids} ids; draft with a "
        f"model that has a row for each, or --draft={NGRAM}"
      )
    context, own = run.c.data.seq_len, draft.c.data.seq_len
    if own < context:
      raise UserError(
        f"--draft: its context is {own} tokens, the run's {context} (data.seq_len); draft with a "
        f"model of at least that context, or --draft={NGRAM}"
      )


class Drafter(Protocol):
  """Drafts tokens for the rows of an engine.

  Attributes:
    most: K, the most tokens that are drafted at a time.
  """

  most: int

  def prefill(self, parts: Sequence[tuple[Row, int]], length: int) -> None:
    """Takes the blocks of prompts that the engine computes now. See `Batch.chunk`."""
    ...

  def draft(
    self, rows: Sequence[tuple[int, Row]], room_B: np.ndarray, seen: tuple[jax.Array, jax.Array]
  ) -> Drafts | None:
    """Drafts tokens for some rows.

    Args:
      rows: (place, row) of each. Their prompts are in the cache.
      room_B: Most tokens of each row.
      seen: The engine's `Carried.prompts` and `Carried.counts`.

    Returns:
      The drafts, or None if each row shall draw one token without.
    """
    ...


def make(drafting: Drafting, run: load.Run, size: programs.Size) -> Drafter:
  """A drafter for a run.

  Args:
    drafting: The choice.
    run: The run.
    size: Size of the engine's cache.

  Raises:
    UserError: The draft model cannot draft for the run.
  """
  drafting.check(run)
  if drafting.run is None:
    return ngrams.Ngrams(size.rows, drafting.tokens)
  num_ids = min(run.tokenizer.vocab_size, drafting.run.tokenizer.vocab_size)
  return model.Model(drafting.run, num_ids, run.c.data.seq_len, size, drafting.tokens)
