"""The decoding engine: continuous batching of requests over a paged cache.

In each step requests enter free rows, a chunk of prompts is computed, and each row that has its
prompt in the cache draws a token, or several with a drafter:

    step         1    2    3    4    5    6
    request 0    P    D    D    D    .             P chunk of prompts, D token drawn
    request 1         P    P    D    D    D
    request 2                   wait P    D        enters the row that request 0 left

A request gets blocks for all tokens that it may have when it enters. So it waits when there are not
enough, and is never interrupted. A chunk has room for some blocks: what the first prompt leaves,
the next ones fill.

The device does not wait for the host. A step begins the next call for rows whose tokens are still
being drawn, and then reads those:

    host      step 1: begin a    step 2: begin b, read a    step 3: begin c, read b
    device    a a a a a a a a a a a b b b b b b b b b b b b b b b c c c c c c c c c

A row whose text turns out to have ended is in one call too many, which nobody reads. Where the next
call depends on the tokens themselves (a prescribed form, beams, drafts), or when a request waits
and a row draws its last token, they are read first.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.engine import beams, constraints, programs, requests, weights
from jaxgpt.inference.engine import blocks as blocks_lib
from jaxgpt.inference.engine.drafting.acceptance import Drafts
from jaxgpt.inference.engine.drafting.drafter import Drafter, Drafting, make
from jaxgpt.inference.engine.limits import Limits
from jaxgpt.inference.engine.requests import Piece, Request, Stats, Token
from jaxgpt.inference.engine.rows import Batch, Group, InFlight, Row, windows
from jaxgpt.inference.engine.text import Text, Vocabulary
from jaxgpt.training import uses
from jaxgpt.tree import PyTree

BLOCK = 64  # tokens of a block
CACHE_TOKENS = 8192  # that the cache holds unless the caller says otherwise, or one context


class Engine:
  """Continues prompts. Synchronous: use it from one thread.

  On a mesh of several processes each must make the same calls with the same arguments.

  Attributes:
    limits: What a request may ask.
  """

  def __init__(
    self,
    run: load.Run,
    *,
    max_rows: int = 8,
    cache_tokens: int | None = None,
    cache_dtype: str | None = None,
    block_size: int = BLOCK,
    chunk_blocks: tuple[int, int] | None = None,
    drafting: Drafting | None = None,
  ):
    """Prepares weights and cache. The programs are compiled when they are needed first.

    A request's text depends neither on the other requests nor on the order of their arrival. It may
    depend, through the last bits of a matmul, on the arguments here.

    Args:
      run: From `load.load`. Its parameters are copied in the form that decoding reads. If it has
        none, `use` must give some before the first step.
      max_rows: Requests that are decoded together.
      cache_tokens: Tokens of the cache. None: one context of each row, but not above `CACHE_TOKENS`
        or one context.
      cache_dtype: dtype of the cache; 'int8' has a scale for each vector. None: the model's
        compute dtype.
      block_size: Tokens of a block.
      chunk_blocks: Blocks that are computed together: of the ends of prompts, and before that. The
        second is a multiple of the first. None: (1, 4) on CPUs, (8, 8) on others.
      drafting: How tokens are drafted that the model then verifies together. None: they are not.

    Raises:
      UserError: The model cannot continue a text, or the draft model cannot draft for it.
    """
    uses.check(run.c, "generate")
    self._run, self._context = run, run.c.data.seq_len
    size, rows = block_size, max_rows
    if cache_tokens is None:
      whole = -(-self._context // size) * size  # a row's blocks are its own
      cache_tokens = max(whole, min(rows * whole, CACHE_TOKENS))
    self._blocks = blocks_lib.Blocks(-(-cache_tokens // size), size)
    model, self._prepared = weights.prepare(run.parts.model)
    dtype = cache_dtype or model.cfg.dtype
    shape = programs.Size(rows, self._blocks.num + 1, size, dtype)
    self._programs = programs.Programs(model, run.tokenizer.vocab_size, shape, run.mesh)
    self._drafter: Drafter | None = make(drafting, run, shape) if drafting else None
    self._params: PyTree = None
    self._weights: Any = None
    self._carried: Any = None
    if chunk_blocks is None:
      chunk_blocks = (1, 4) if jax.default_backend() == "cpu" else (8, 8)
    self._small, self._large = (blocks * size for blocks in chunk_blocks)
    self._ends = frozenset(run.generation.end_ids)
    self._grammars = constraints.Grammars(run.tokenizer, self._ends)
    self._vocabulary = Vocabulary(run.tokenizer)
    kinds, platform = windows(model.cfg), run.mesh.devices.flat[0].platform
    self._batch = Batch(rows, size, self._context, kinds, self._grammars.num_words, platform)
    self._rows: list[Row | None] = [None] * rows
    self._queue = deque[tuple[int, Request]]()
    self._cancelled, self._in_flight = set[int](), deque[InFlight]()
    self._pieces = list[Piece]()  # that the next step returns
    self._next = self._prefilled = self._reused = self._decoded = 0
    self._drafted = self._accepted = 0
    self.limits = Limits(run, rows, self._blocks, self._grammars)
    self.use(run.params)

  def use(self, params: PyTree | None) -> None:
    """Goes on with other weights, which empties the cache.

    Args:
      params: All parameters, on the run's mesh. The same object as before: nothing changes. None:
        frees the memory of weights and cache, until the next call.

    Raises:
      ValueError: Requests are running or waiting.
    """
    if self.busy:
      raise ValueError("the engine's weights cannot change while it continues texts")
    if params is self._params:
      return
    self._params = self._weights = self._carried = None  # makes room for the new ones
    self._in_flight.clear()
    self._blocks = blocks_lib.Blocks(self._blocks.num, self._blocks.size)
    if params is not None:
      with jax.set_mesh(self._run.mesh):
        self._weights = self._prepared(params)
        self._carried = self._programs.empty()
      self._params = params

  def compile(self) -> None:
    """Compiles the programs, and runs each once, where else the first requests wait for it."""
    room = self.limits.longest - 1
    asked = [Request((0,) * min(self._large + self._small + 1, room), 1)]
    if self._drafter and room > 4:
      asked.append(Request((0,) * 3, 3))  # n-grams find something here
    for _ in self.run(asked):
      pass

  def check(self, request: Request) -> None:
    """Raises a UserError that names the first fault of a request."""
    self.limits.check(request)

  def add(self, request: Request) -> int:
    """Queues a request.

    Returns:
      Its number.

    Raises:
      UserError: See `check`.
    """
    self.check(request)
    number, self._next = self._next, self._next + 1
    self._queue.append((number, request))
    return number

  def cancel(self, number: int) -> None:
    """Ends a request. Its row and blocks are free after the next step. Ended ones stay as is."""
    self._cancelled.add(number)

  @property
  def busy(self) -> bool:
    """Whether a request is queued or running."""
    return bool(self._queue or self._pieces) or any(self._rows)

  def stats(self) -> Stats:
    """The present state, and totals since the start."""
    return Stats(
      running=sum(row is not None for row in self._rows),
      waiting=len(self._queue),
      blocks=self._blocks.num,
      blocks_used=self._blocks.num - self._blocks.free,
      prefilled=self._prefilled,
      reused=self._reused,
      decoded=self._decoded,
      drafted=self._drafted,
      accepted=self._accepted,
    )

  def step(self) -> list[Piece]:
    """Cancels, admits, computes a chunk of prompts, begins the next tokens and reads the last."""
    self._pieces += self._cancel()
    with jax.set_mesh(self._run.mesh):
      if not self._runs_ahead():  # a request that waits may take a row that ends now
        self._read(0)
      # The more rows idle, the more tokens of prompts before the others go on.
      left = self._small * (1 + sum(row is None or not row.is_prefilled for row in self._rows))
      while left > 0 and (parts := self._parts()):
        left -= self._prefill(parts)
      drawing = [
        (b, row)
        for b, row in enumerate(self._rows)
        if row and row.is_prefilled and not row.draws_its_last(self._context)
      ]
      if drawing:
        self._begin(drawing)
      # A request that entered in this step may need its tokens before the next call.
      self._read(1 if drawing and self._runs_ahead() else 0)
    pieces, self._pieces = self._pieces, []
    return pieces

  def run(self, requests: Iterable[Request]) -> Iterator[Piece]:
    """Continues all of some requests, which are read as rows become free.

    Yields:
      Pieces, with the requests numbered as `add` does.

    Raises:
      UserError: See `check`.
    """
    left = iter(requests)
    more = True
    while more or self.busy:
      while more and len(self._queue) < len(self._rows):
        request = next(left, None)
        if request is None:
          more = False
        else:
          self.add(request)
      yield from self.step()

  def texts(
    self,
    requests: Sequence[Request],
    watched: Callable[[Iterable[Piece]], Iterable[Piece]] = iter,
  ) -> list[tuple[str, str]]:
    """Continues all of some requests.

    Args:
      requests: The requests.
      watched: Passes the pieces on as they come.

    Returns:
      (text, why it ended) of each, in their order. See `requests.problem` for those that failed.

    Raises:
      UserError: See `check`.
    """
    first, found = self._next, [("", "")] * len(requests)
    for piece in watched(self.run(requests)):
      if piece.request >= first:
        before = found[piece.request - first][0]
        found[piece.request - first] = before + piece.text, piece.finish or ""
    return found

  def _cancel(self) -> list[Piece]:
    pieces = list[Piece]()
    if self._cancelled:
      gone = [number for number, _ in self._queue if number in self._cancelled]
      self._queue = deque(entry for entry in self._queue if entry[0] not in self._cancelled)
      for b, row in enumerate(self._rows):
        if row is not None and row.number in self._cancelled:
          gone.append(row.number)
          self._leave(b, row)
      pieces = [Piece(number, "", (), requests.CANCELLED) for number in sorted(gone)]
      self._cancelled.clear()
    return pieces

  def _parts(self) -> list[tuple[Row, int]]:
    """Rows whose prompts are computed next in one call, and how many blocks of each."""
    parts, room, size = list[tuple[Row, int]](), 0, self._blocks.size
    waiting = [row for row in self._rows if row is not None and not row.is_prefilled]
    waiting.sort(key=lambda row: row.number)
    while room or not parts:
      row = waiting.pop(0) if waiting else self._admit()
      if row is None:
        break
      is_large = row.cached < row.large
      if row.is_prefilled or (parts and is_large != (parts[0][0].cached < parts[0][0].large)):
        continue
      if not parts:
        room = (self._large if is_large else self._small) // size
      end = row.large if is_large else len(row.request.prompt) - 1
      count = min(room, self._blocks.needed(end - row.cached))
      parts.append((row, count))
      room -= count
    return parts

  def _admit(self) -> Row | None:
    """Gives the next request a row and blocks, if there are any."""
    if not self._queue:
      return None
    number, request = self._queue[0]
    if self._idle() < (request.beams.width if request.beams else 1):
      return None
    before = request.prompt[:-1]  # the last token is decoded
    if self._is_begun(before):
      return None
    # The same tokens are computed in the same size of chunks, whatever is found.
    large = len(before) // self._large * self._large if self._large > self._small else 0
    found = self._blocks.find(before, large)
    is_large = len(found) * self._blocks.size < large
    if extra := is_large and len(found) % (self._large // self._blocks.size):
      self._blocks.release(found[-extra:])
      del found[-extra:]
    fresh = self._blocks.take(self.limits.blocks(request) - len(found))
    if fresh is None:
      self._blocks.release(found)
      return None
    self._queue.popleft()
    blocks = found + fresh
    own = self._blocks.needed(self.limits.most_tokens(request))
    row = Row(
      number,
      request,
      blocks[:own],
      cached=len(found) * self._blocks.size,
      last=request.prompt[-1],
      text=Text(self._vocabulary, request.prompt, request.stop),
      large=large,
    )
    if request.constraint:
      row.matcher = self._grammars.matcher(request.constraint)
      row.allowed = row.matcher.mask()
    b = self._rows.index(None)
    self._rows[b] = row
    if request.beams:
      size = own - self.limits.full_blocks(request)
      spare = [blocks[start : start + size] for start in range(own, len(blocks), size)]
      max_new = min(request.max_new, self._context - len(request.prompt))
      search = beams.Search(request.beams, self._ends, max_new)
      row.group = Group(request, search, b, spare)
    self._reused += row.cached
    return row

  def _idle(self) -> int:
    """Rows that a request may take: those that are free and not promised to beams."""
    first = [row for b, row in enumerate(self._rows) if row and row.group and row.group.at[0] == b]
    promised = sum(row.group.waiting for row in first if row.group)
    return self._rows.count(None) - promised

  def _enter(self, b: int, request: Request) -> None:
    s = request.sampling
    if (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1, 0, 0):
      prompt_V = np.zeros(self._carried.prompts.shape[1], bool)
      prompt_V[list(request.prompt)] = True
      self._carried = self._programs.enter(self._carried, b, prompt_V)

  def _is_begun(self, prompt: Sequence[int]) -> bool:
    """Whether a prompt that begins alike is being computed, so that waiting saves computing it."""
    first = tuple(prompt[: self._blocks.size])
    return len(first) == self._blocks.size and any(
      row is not None and not row.is_prefilled and row.request.prompt[: len(first)] == first
      for row in self._rows
    )

  def _prefill(self, parts: Sequence[tuple[Row, int]]) -> int:
    """Computes blocks of prompts in one call. Returns its size in tokens."""
    first, _ = parts[0]
    length = self._large if first.cached < first.large else self._small
    chunk = self._batch.chunk(parts, length)
    self._carried = self._programs.prefill(self._weights, self._carried, *chunk)
    if self._drafter:
      self._drafter.prefill(parts, length)
    for row, count in parts:
      before = len(row.request.prompt) - 1
      after = min(row.cached + count * self._blocks.size, before)
      self._prefilled += after - row.cached
      row.cached = after
      if row.is_prefilled:
        self._blocks.publish(row.request.prompt[:before], row.blocks, row.large)
    return length

  def _runs_ahead(self) -> bool:
    """Whether the next call can begin before the tokens of the last one are read."""
    rows = [row for row in self._rows if row]
    return (
      self._drafter is None
      and not any(row.matcher or row.group for row in rows)
      # A request that waits for a row gets it as soon as one is free.
      and not (self._queue and any(row.draws_its_last(self._context) for row in rows))
    )

  def _begin(self, drawing: list[tuple[int, Row]]) -> None:
    """Begins to draw tokens for some rows."""
    for b, row in drawing:
      if not (row.written or row.unread):
        self._enter(b, row.request)  # not before: each call counts a token for all rows
    drafts = self._draft(drawing)
    if drafts is None:
      inputs = self._batch.step(drawing)
      self._carried, drawn = self._programs.decode(self._weights, self._carried, inputs)
    else:
      assert self._drafter is not None
      inputs = self._batch.step(drawing, np.asarray(drafts.num), self._drafter.most)
      self._carried, drawn = self._programs.verify(self._weights, self._carried, inputs, drafts)
      self._drafted += int(np.sum(drafts.num))
    for _, row in drawing:
      row.cached += 1  # more are added when it is known how many drafts were accepted
      row.unread += 1
    self._in_flight.append(InFlight(drawing, drawn))

  def _read(self, most: int) -> None:
    """Reads the tokens of the oldest calls in flight, until at most some are left."""
    while len(self._in_flight) > most:
      call = self._in_flight[0]
      # Rows that were cancelled or have ended since are left out.
      drawing = [(b, row) for b, row in call.rows if self._rows[b] is row]
      found: Any = jax.device_get(call.drawn) if drawing else None
      self._in_flight.popleft()  # not before: an interrupted wait must lose no token
      for b, row in drawing:
        row.unread -= 1
        row.cached += int(found.num[b]) - 1
        self._accepted += int(found.num[b]) - 1
      self._pieces += [piece for b, row in drawing for piece in self._advance(b, row, found)]

  def _draft(self, drawing: Sequence[tuple[int, Row]]) -> Drafts | None:
    """Tokens that may follow those of some rows, or None without a drafter."""
    if self._drafter is None:
      return None
    room_B = np.zeros(len(self._rows), np.int32)
    for b, row in drawing:
      # What a form allows after a drafted token is not known before it is drawn.
      left = row.left(self._context) - 1
      room_B[b] = 0 if row.matcher or row.group else min(left, self._drafter.most)
    return self._drafter.draft(drawing, room_B, (self._carried.prompts, self._carried.counts))

  def _advance(self, b: int, row: Row, found: Any) -> list[Piece]:
    """What a row's new tokens add to its text."""
    if row.group:
      return self._advance_beams(row.group, found) if row.group.at[0] == b else []
    released, finish = list[Token](), None
    for t in range(found.num[b]):
      self._decoded += 1
      some, finish = self._write(row, found.token(b, t, row.request.logprobs))
      released += some
      if finish:
        released += row.text.end()
        self._leave(b, row)
        break
    if not released and not finish:
      return []
    return [Piece(row.number, "".join(t.text for t in released), tuple(released), finish)]

  def _advance_beams(self, group: Group, found: Any) -> list[Piece]:
    """Goes on with the best continuations of a request's beams, or ends it with its text."""
    rows = [row for b in group.at if (row := self._rows[b])]
    self._decoded += len(rows)
    best = found.best[group.at, 0], found.best_logprobs[group.at, 0]
    if not (going := group.search.advance(*best)):
      self._leave(group.at[0], rows[0])
      return [group.piece(rows[0], self._ends)]
    used = self._blocks.needed(rows[0].cached)
    rows, copies = group.split(rows, going, self.limits.full_blocks(rows[0].request), used)
    for place, row in enumerate(rows):
      if place == len(group.at):
        group.at.append(self._rows.index(None))
      self._rows[group.at[place]] = row
    self._carried = self._programs.copy(self._carried, copies)
    return []

  def _write(self, row: Row, token: Token) -> tuple[list[Token], str | None]:
    """Adds a token to a row's text: (tokens that are released, why the text ends or None)."""
    row.last = token.id
    row.written.append(token.id)
    if token.id in self._ends:
      return [], requests.STOP
    released, stopped = row.text.add(token)
    problem = self._constrain(row)
    if stopped or (row.matcher and row.matcher.is_complete):
      return released, requests.STOP
    if not row.left(self._context):
      return released, requests.LENGTH
    return released, requests.ERROR + problem if problem else None

  def _constrain(self, row: Row) -> str:
    """Goes on in the form of a row's text. Returns the reason why that is not possible, or ''."""
    if row.matcher:
      row.matcher.take(row.last)
      try:
        row.allowed = None if row.matcher.is_complete else row.matcher.mask()
      except UserError as e:
        return str(e)
    return ""

  def _leave(self, b: int, row: Row) -> None:
    places = row.group.at if row.group else [b]
    blocks = row.blocks
    if row.group:
      rows = [other for place in places if (other := self._rows[place])]
      blocks = row.group.blocks(rows, self.limits.full_blocks(row.request))
    self._blocks.release(blocks)
    for place in places:
      self._rows[place] = None
