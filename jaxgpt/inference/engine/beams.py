"""Beam search: the most likely continuations so far go on together.

Each of W beams has a row of the batch. In each step the W best of all continuations of all beams go
on. So a beam may split, and another one end:

    beam 0    a -- cat --+-- sat      the first child keeps the blocks of its beam
                         |
    beam 1    a -- dog   +-- was      the second one takes those of a beam without children, into
                                      which the blocks of new tokens are copied

Full blocks of the prompt belong to all beams and are never copied. Texts and scores are those of
transformers' `generate(num_beams=W)`. The search itself is arXiv:1409.3215, section 3.2, with the
length penalty of that library.

W beam, A alternative.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.inference.engine.requests import Beams, Request


class Scored(NamedTuple):
  """A text.

  Attributes:
    score: The sum of its tokens' log-probabilities. If it has ended, see `Beams.length_penalty`.
    tokens: Its tokens. An end token is the last one.
  """

  score: np.float32
  tokens: tuple[int, ...]


class Search:
  """The beams of one request, and the texts that have ended.

  Attributes:
    found: The best texts that have ended, at most W, best first.
  """

  def __init__(self, beams: Beams, ends: Iterable[int], max_new: int):
    """Args: beams: Settings. ends: Tokens that end a text. max_new: Most tokens of a text."""
    self._beams, self._ends, self._max_new = beams, frozenset(ends), max_new
    self._running = [Scored(np.float32(0), ())]
    self.found = list[Scored]()

  def advance(self, ids_WA: np.ndarray, logprobs_WA: np.ndarray) -> list[tuple[int, int]]:
    """Chooses the beams of the next step.

    Args:
      ids_WA: For each beam its most likely next tokens, at least W and one for each end token.
      logprobs_WA: Their log-probabilities, float32.

    Returns:
      (beam, its next token) of each new beam, best first. Empty: the search is over.
    """
    scores_WA = np.array([beam.score for beam in self._running], np.float32)[:, None] + logprobs_WA
    width, length = self._beams.width, len(self._running[0].tokens) + 1
    order = np.argsort(-scores_WA, axis=None, kind="stable")
    going, ended = list[tuple[int, int]](), list[Scored]()
    running = list[Scored]()
    for rank, flat in enumerate(order):
      i, a = divmod(int(flat), scores_WA.shape[1])
      token = int(ids_WA[i, a])
      text = Scored(scores_WA[i, a], (*self._running[i].tokens, token))
      if token in self._ends or length == self._max_new:
        if rank < width:
          ended.append(text._replace(score=self._score(text.score, length)))
      elif len(going) < width:
        going.append((i, token))
        running.append(text)
      if rank >= width and len(going) == width:
        break
    self.found = sorted(self.found + ended, key=lambda text: -text.score)[:width]
    self._running = running
    return going if going and self._may_improve(length) else []

  def _may_improve(self, length: int) -> bool:
    """Whether a beam could still give a better text than the worst of those that have ended.

    It supposes that the score of the best beam gets no better, as transformers does.
    """
    if len(self.found) < self._beams.width:
      return True
    best = self._score(self._running[0].score, length)
    return not self._beams.early_stopping and bool(best > self.found[-1].score)

  def _score(self, total: np.float32, length: int) -> np.float32:
    return np.float32(total / np.float32(length**self._beams.length_penalty))


def check(request: Request, max_rows: int, ends: int, most: int) -> None:
  """Checks a request with beams.

  Args:
    request: The request.
    max_rows: Rows of the engine.
    ends: Number of tokens that end a text.
    most: A, alternatives of a step.

  Raises:
    UserError: It asks for something that beam search cannot do.
  """
  beams = request.beams
  assert beams is not None
  if not 1 <= beams.width <= most - ends:
    raise UserError(
      f"beams={beams.width} must be from 1 to {most - ends}: a step has {most} alternatives, and "
      f"{ends} tokens end a text"
    )
  if beams.width > max_rows:
    raise UserError(
      f"beams={beams.width} need {beams.width} rows of the batch, which has {max_rows}: raise "
      "batch_size, or take fewer beams"
    )
  if not np.isfinite(beams.length_penalty):
    raise UserError(f"length_penalty={beams.length_penalty} must be finite")
  s = request.sampling
  if s.temperature or (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1, 0, 0):
    raise UserError(
      "beams draw nothing: leave temperature and penalties out, or the beams; given is "
      f"temperature={s.temperature:g}, repetition_penalty={s.repetition_penalty:g}, "
      f"presence_penalty={s.presence_penalty:g}, frequency_penalty={s.frequency_penalty:g}"
    )
  if request.logprobs is not None or request.constraint:
    what = "logprobs" if request.logprobs is not None else "a prescribed form"
    raise UserError(f"beams do not go with {what}: leave one of them out")
