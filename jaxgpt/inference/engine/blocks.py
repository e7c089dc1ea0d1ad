"""The blocks of a paged cache: which are free, who holds which, and which prompts begin alike.

A block of S tokens is held by any number of requests. When the last one lets go of it, a block that
is full of a prompt's tokens stays findable until its place is needed, the longest unused first.

    prompt A   [a a a a][b b b b][c c           digest(a) -> 1, digest(a b) -> 2
    prompt B   [a a a a][b b b b][d d d d]      holds 1 and 2 too, and computes from d on

Only tokens of prompts are found again, and only by prompts that compute them in chunks of the same
size. The keys of drawn tokens were computed in another shape, and could differ in the last bit.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

SPARE = 0  # a block that nobody holds: rows without a request write there


class Blocks:
  """Bookkeeping of a pool of blocks.

  Attributes:
    size: S, tokens of a block.
    num: Blocks that can be held.
  """

  def __init__(self, num: int, size: int):
    """Args: num: Blocks, without `SPARE`. size: S."""
    self.num, self.size = num, size
    self._holders = [0] * (num + 1)
    self._fresh = list(range(num, SPARE, -1))  # free, without content
    self._idle: OrderedDict[int, None] = OrderedDict()  # free, findable, longest unused first
    self._of_digest: dict[bytes, int] = {}
    self._digest_of: dict[int, bytes] = {}

  @property
  def free(self) -> int:
    """Number of blocks that nobody holds."""
    return len(self._fresh) + len(self._idle)

  def needed(self, num_tokens: int) -> int:
    """Blocks for a number of tokens."""
    return -(-num_tokens // self.size)

  def find(self, tokens: Sequence[int], large: int = 0) -> list[int]:
    """Takes hold of the blocks that hold the beginning of a prompt, as far as there are any.

    Args:
      tokens: The prompt's tokens.
      large: As many of them are computed in large chunks.
    """
    found = list[int]()
    for digest in self._digests(tokens, large):
      block = self._of_digest.get(digest)
      if block is None:
        break
      self._hold(block)
      found.append(block)
    return found

  def take(self, count: int) -> list[int] | None:
    """Takes hold of empty blocks, or of none if there are not enough."""
    if count > self.free:
      return None
    taken = list[int]()
    for _ in range(count):
      if self._fresh:
        block = self._fresh.pop()
      else:
        block, _ = self._idle.popitem(last=False)
        del self._of_digest[self._digest_of.pop(block)]
      self._hold(block)
      taken.append(block)
    return taken

  def release(self, blocks: Sequence[int]) -> None:
    """Lets go of blocks."""
    # The end of a prompt is less likely to be shared than its beginning.
    for block in reversed(blocks):
      self._holders[block] -= 1
      if not self._holders[block]:
        if block in self._digest_of:
          self._idle[block] = None
        else:
          self._fresh.append(block)

  def publish(self, tokens: Sequence[int], blocks: Sequence[int], large: int = 0) -> None:
    """Makes the full blocks of a prompt findable. Those of equal content that are so stay.

    Args:
      tokens: The prompt's tokens that are in the cache.
      blocks: Its blocks.
      large: As many of the tokens were computed in large chunks.
    """
    for digest, block in zip(self._digests(tokens, large), blocks):
      if digest not in self._of_digest and block not in self._digest_of:
        self._of_digest[digest] = block
        self._digest_of[block] = digest

  def _hold(self, block: int) -> None:
    self._holders[block] += 1
    self._idle.pop(block, None)

  def _digests(self, tokens: Sequence[int], large: int) -> list[bytes]:
    """For each full block the digest of all tokens up to its end, and of its chunk's size."""
    running, out = hashlib.sha256(), list[bytes]()
    array = np.asarray(tokens, np.int32)
    for start in range(0, len(array) - self.size + 1, self.size):
      running.update(array[start : start + self.size].tobytes())
      digest = running.copy()
      digest.update(b"large" if start + self.size <= large else b"small")
      out.append(digest.digest())
    return out
