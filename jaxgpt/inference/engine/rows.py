"""The rows of a batch as arrays: the blocks that a step reads and writes, and how it draws tokens.

B row, J block of a row, P pair of a row and a block, V vocabulary, W word of 32 tokens.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from jaxgpt.inference.engine.beams import Search
from jaxgpt.inference.engine.blocks import SPARE
from jaxgpt.inference.engine.constraints import Matcher
from jaxgpt.inference.engine.programs import Drawn, StepInputs
from jaxgpt.inference.engine.requests import LENGTH, STOP, Piece, Request, Token
from jaxgpt.inference.engine.text import Text
from jaxgpt.inference.sampling import Sampling
from jaxgpt.model.attention import paged


@dataclasses.dataclass
class Row:
  """A request that has a row of the batch.

  Attributes:
    number: The request's number.
    request: The request.
    blocks: Its blocks of the cache, for all tokens that it may have.
    cached: Tokens in the cache, including those that a call in flight writes.
    last: The token that is decoded next, if `unread` is 0.
    unread: Calls in flight that draw a token of this row.
    text: Its text.
    written: Its tokens after the prompt.
    large: Tokens of the prompt that are computed in large chunks, the first ones.
    matcher: How far the text is in its form, if the request prescribes one.
    allowed: uint32 [W], the tokens that may follow then.
    group: The rows of its request, if that searches with beams.
  """

  number: int
  request: Request
  blocks: list[int]
  cached: int
  last: int
  text: Text
  written: list[int] = dataclasses.field(default_factory=list)
  large: int = 0
  matcher: Matcher | None = None
  allowed: np.ndarray | None = None
  group: "Group | None" = None
  unread: int = 0

  def left(self, context: int) -> int:
    """Tokens that may follow those that were read. `context`: longest context in tokens."""
    request = self.request
    return min(request.max_new, context - len(request.prompt)) - len(self.written)

  def draws_its_last(self, context: int) -> bool:
    """Whether the calls in flight draw all tokens for which there is room. See `left`."""
    return 0 < self.left(context) <= self.unread

  @property
  def is_prefilled(self) -> bool:
    """Whether the prompt is in the cache, apart from its last token."""
    return self.cached >= len(self.request.prompt) - 1


class InFlight(NamedTuple):
  """A call that has begun, and whose tokens are not read yet.

  Attributes:
    rows: (place, row) of each row that draws.
    drawn: What they draw.
  """

  rows: list[tuple[int, Row]]
  drawn: Drawn


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


_GREEDY = Sampling(temperature=0.0)


def windows(cfg: ml_collections.FrozenConfigDict) -> dict[str, int | None]:
  """{kind of attention that a model has: its window, or None}. `cfg` is its `model` section."""
  return {kind: cfg.window if kind == "local" else None for kind in cfg.attention_pattern}


class Batch:
  """The rows of a batch as the arrays of a step."""

  def __init__(
    self,
    num_rows: int,
    block_size: int,
    context: int,
    windows: Mapping[str, int | None],
    num_words: int,
    platform: str,
  ):
    """Prepares for a model.

    Args:
      num_rows: B.
      block_size: Tokens of a block.
      context: Longest context in tokens.
      windows: See `windows`.
      num_words: W.
      platform: Of the devices, such as 'cpu'.
    """
    self._num_words = num_words
    self._num_rows, self._size, self._context = num_rows, block_size, context
    self._windows = windows
    self._per_row = -(-context // block_size)
    self._turn = paged.pairs_per_turn(num_rows, platform)
    self._most_pairs = -(-num_rows * self._per_row // self._turn) * self._turn

  def chunk(
    self, parts: Sequence[tuple[Row, int]], length: int
  ) -> tuple[np.ndarray, np.ndarray, paged.Chunk]:
    """The next blocks of some rows' prompts: the arguments of `Programs.prefill`.

    Args:
      parts: (row, number of its blocks).
      length: Tokens of the call. Blocks that the parts do not fill are not read.
    """
    S = self._size
    tokens_CS = np.zeros((length // S, S), np.int32)
    positions_CS = np.tile(np.arange(S, dtype=np.int32), (length // S, 1))
    tables_CJ = np.full((length // S, self._per_row), SPARE, np.int32)
    numbers_C = np.zeros(length // S, np.int32)
    c = 0
    for row, count in parts:
      for number in range(row.cached // S, row.cached // S + count):
        part = row.request.prompt[number * S : min((number + 1) * S, len(row.request.prompt) - 1)]
        tokens_CS[c, : len(part)] = part
        positions_CS[c] += number * S
        tables_CJ[c, : len(row.blocks)] = row.blocks
        numbers_C[c] = number
        c += 1
    # What follows a prompt in its last block is not read, but a position must exist.
    positions = np.minimum(positions_CS, self._context - 1).ravel()
    return tokens_CS.ravel(), positions, paged.Chunk(tables_CJ, numbers_C, self._context)

  def step(
    self,
    rows: Iterable[tuple[int, Row]],
    drafted_B: Sequence[int] | np.ndarray | None = None,
    most: int = 0,
  ) -> StepInputs:
    """The next token of some rows, and drafted ones.

    Args:
      rows: (place, row) of each. Their prompts are in the cache.
      drafted_B: How many drafted tokens follow each row's own. None: none.
      most: K, the most of them that a call has room for.
    """
    B, S = self._num_rows, self._size
    more_B = np.zeros(B, np.int32) if drafted_B is None else drafted_B
    there = [(b, row, row.cached + int(more_B[b])) for b, row in rows]
    tokens, positions = np.zeros((2, B), np.int32)
    blocks, offsets = np.zeros((2, B, 1 + most), np.int32)
    seeds = np.zeros((B, 2), np.uint32)
    unread, with_logprobs, constrained = np.zeros((3, B), bool)
    allowed = np.zeros((B, self._num_words), np.uint32)
    settings = [_GREEDY] * B
    for b, row, last in there:
      request = row.request
      tokens[b], unread[b], positions[b] = row.last, row.unread > 0, row.cached
      for t, at in enumerate(range(row.cached, last + 1)):
        blocks[b, t], offsets[b, t] = row.blocks[at // S], at % S
      seeds[b] = (request.seed >> 32) & 0xFFFFFFFF, request.seed & 0xFFFFFFFF
      with_logprobs[b] = request.logprobs is not None or request.beams is not None
      settings[b] = request.sampling
      if row.allowed is not None:
        constrained[b], allowed[b] = True, row.allowed
    pairs = {kind: self._pairs(there, window) for kind, window in self._windows.items()}
    columns = zip(*settings, strict=True)
    draws = Sampling(
      *(
        np.array(column, np.int32 if name == "top_k" else np.float32)
        for name, column in zip(Sampling._fields, columns, strict=True)
      )
    )
    call = paged.Step(blocks, offsets, pairs, self._context, self._turn)
    return StepInputs(
      tokens, unread, positions, call, draws, seeds, with_logprobs, constrained, allowed
    )

  def _pairs(self, there: Sequence[tuple[int, Row, int]], window: int | None) -> paged.Pairs:
    """The blocks that hold what each row's tokens see. The last one's position is the third."""
    S, P = self._size, self._most_pairs
    numbers, blocks, starts = np.zeros((3, P), np.int32)
    table = np.full((self._num_rows, self._per_row), P, np.int32)
    at = 0
    for b, row, last in there:
      first = 0 if window is None else max(row.cached - window + 1, 0) // S
      count = last // S + 1 - first
      here = slice(at, at + count)
      numbers[here] = b
      blocks[here] = row.blocks[first : first + count]
      starts[here] = np.arange(first, first + count) * S
      table[b, :count] = np.arange(at, at + count)
      at += count
    return paged.Pairs(numbers, blocks, starts, table, np.array(at, np.int32))
