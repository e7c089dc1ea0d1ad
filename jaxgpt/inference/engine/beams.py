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

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.inference.engine.requests import LENGTH, STOP, Beams, Piece, Request, Token
from jaxgpt.inference.engine.rows import Row


class Found(NamedTuple):
  """A text that has ended.

  Attributes:
    score: See `Beams.length_penalty`.
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
    self._running = [Found(np.float32(0), ())]
    self.found = list[Found]()

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
    going, ended = list[tuple[int, int]](), list[Found]()
    running = list[Found]()
    for rank, flat in enumerate(order):
      i, a = divmod(int(flat), scores_WA.shape[1])
      token = int(ids_WA[i, a])
      text = Found(scores_WA[i, a], (*self._running[i].tokens, token))
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


class Group:
  """The rows of a request with beams: one while its prompt is computed, then W.

  Attributes:
    at: Their places in the batch, in the order of the beams.
    search: The search.
    waiting: Rows that it will need and does not have yet.
  """

  def __init__(self, request: Request, search: Search, place: int, spare: Sequence[list[int]]):
    """Begins with one row.

    Args:
      request: The request.
      search: Its search.
      place: The row's place in the batch.
      spare: For each further beam its blocks, for all tokens after the prompt's full blocks.
    """
    assert request.beams is not None
    self.at, self.search = [place], search
    self._width, self._spare = request.beams.width, list(spare)

  @property
  def waiting(self) -> int:
    return self._width - len(self.at)

  def blocks(self, rows: Sequence[Row], shared: int) -> list[int]:
    """All blocks of the group. `shared`: see `split`."""
    own = [row.blocks[shared:] for row in rows]
    return rows[0].blocks[:shared] + [block for some in (*own, *self._spare) for block in some]

  def split(
    self, rows: Sequence[Row], going: Sequence[tuple[int, int]], shared: int, used: int
  ) -> tuple[list[Row], list[tuple[int, int]]]:
    """The rows of the next step.

    Args:
      rows: The rows, in the order of the beams.
      going: (beam, its next token) of each new beam.
      shared: Blocks at the beginning of each row that are full of the prompt's tokens.
      used: Blocks of each row that hold tokens.

    Returns:
      (rows, blocks to be copied as (from, to)).
    """
    parents = {parent for parent, _ in going}
    unused = [row.blocks[shared:] for i, row in enumerate(rows) if i not in parents] + self._spare
    out, copies, kept = list[Row](), list[tuple[int, int]](), set[int]()
    for parent, token in going:
      row = rows[parent]
      blocks = row.blocks
      if parent in kept:
        own = unused.pop()
        copies += zip(blocks[shared:used], own)
        blocks = blocks[:shared] + own
      kept.add(parent)
      new = dataclasses.replace(row, blocks=blocks, last=token, written=[*row.written, token])
      out.append(new)
    self._spare = unused
    return out, copies

  def piece(self, row: Row, ends: Iterable[int]) -> Piece:
    """The best text, whole. `ends`: tokens that end a text."""
    released, finish = list[Token](), LENGTH
    for token in self.search.found[0].tokens:
      stopped = token in ends
      if not stopped:
        some, stopped = row.text.add(Token(token, ""))
        released += some
      if stopped:
        finish = STOP
        break
    released += row.text.end()
    return Piece(row.number, "".join(token.text for token in released), tuple(released), finish)


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
      f"beams={beams.width} need a row each, of {max_rows}: give more rows (batch_size), or fewer "
      "beams"
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
