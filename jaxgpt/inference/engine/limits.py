"""What a request may ask of an engine, and the room that it takes in the cache."""

from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.engine import beams
from jaxgpt.inference.engine.blocks import Blocks
from jaxgpt.inference.engine.constraints import Grammars
from jaxgpt.inference.engine.programs import MOST_ALTERNATIVES
from jaxgpt.inference.engine.requests import Request


class Limits:
  """The limits of an engine.

  Attributes:
    longest: Most tokens of a prompt and its continuation together: the context, or what the cache
      holds if that is less.
  """

  def __init__(self, run: load.Run, rows: int, blocks: Blocks, grammars: Grammars):
    """Args: run: The run. rows: Of a batch. blocks: Of the cache. grammars: For forms of texts."""
    self._tokenizer, self._context = run.tokenizer, run.c.data.seq_len
    self._vocab_size, self._ends = run.c.model.vocab_size, len(set(run.generation.end_ids))
    self._rows, self._num, self._size, self._grammars = rows, blocks.num, blocks.size, grammars
    self.longest = min(self._context, self._num * self._size + 1)  # the last one does not enter it

  def check(self, request: Request) -> None:
    """Raises a UserError that names the first fault of a request."""
    request.sampling.check()
    if not request.prompt:
      raise UserError("the prompt has no token: give at least one, such as the tokenizer's bos")
    if request.max_new < 1:
      raise UserError(f"max_new={request.max_new} must be at least 1")
    self._tokenizer.check_rows(request.prompt, self._vocab_size)
    if min(request.prompt) < 0:
      raise UserError(
        f"the prompt has the token id {min(request.prompt)}, which must be at least 0"
      )
    if len(request.prompt) >= self._context:
      raise UserError(
        f"the prompt has {len(request.prompt)} tokens, the model's context {self._context} "
        f"(data.seq_len): shorten it by at least {len(request.prompt) - self._context + 1}"
      )
    most = MOST_ALTERNATIVES
    if request.beams:
      few = min(most, self._tokenizer.vocab_size)
      beams.check(request, self._rows, self._ends, few)
    if self.blocks(request) > self._num:
      tokens = self.most_tokens(request)
      if request.beams:
        tokens = self.blocks(request) * self._size
      raise UserError(
        f"the prompt and max_new={request.max_new} need {tokens} tokens of the cache, which has "
        f"{self._num * self._size}: ask for fewer{' beams' * bool(request.beams)}"
      )
    if request.logprobs is not None and not 0 <= request.logprobs <= most:
      raise UserError(f"logprobs={request.logprobs} must be from 0 to {most}")
    if not all(request.stop):
      raise UserError("a stop string is empty; leave it out")
    if request.constraint:
      self._grammars.matcher(request.constraint).mask()

  def most_tokens(self, request: Request) -> int:
    """Tokens of a request in the cache at its end. The last one drawn does not enter it."""
    return min(len(request.prompt) + request.max_new, self._context) - 1

  def blocks(self, request: Request) -> int:
    """Blocks for all tokens of a request, in each of its beams."""
    one, search = -(-self.most_tokens(request) // self._size), request.beams
    return one + (search.width - 1) * (one - self.full_blocks(request)) if search else one

  def full_blocks(self, request: Request) -> int:
    """Blocks that are full of a prompt's tokens when its last one is decoded."""
    return (len(request.prompt) - 1) // self._size
