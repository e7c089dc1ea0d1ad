"""From tokens to text as they are drawn: whole characters, whole tokens, stop strings held back."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from jaxgpt.errors import UserError
from jaxgpt.inference.engine.requests import Token
from jaxgpt.text.tokenizers import token_bytes
from jaxgpt.text.tokenizers.base import Tokenizer

_BEFORE = 8  # tokens of the prompt that are decoded along: the space before a word, half characters
_HALF = "\ufffd"  # bytes that are not a whole character decode to this


class Vocabulary:
  """A tokenizer, and the bytes that its tokens stand for. One for all texts of an engine.

  Attributes:
    tokenizer: The tokenizer.
    bytes: The bytes of each id. None: its tokens are words, and never a part of a character.
  """

  def __init__(self, tokenizer: Tokenizer):
    """Args: tokenizer: Of the run."""
    self.tokenizer = tokenizer
    try:
      self.bytes: list[bytes] | None = token_bytes.of(tokenizer)
    except UserError:  # such as WordPiece
      self.bytes = None
      return
    if tokenizer.unk_id is not None:
      self.bytes[tokenizer.unk_id] = tokenizer.decode([tokenizer.unk_id]).encode()

  def after(self, prompt: Sequence[int]) -> "_Decoder":
    """Decodes the tokens that follow a prompt.

    What follows a special token is a text of its own, as it was encoded: an answer in a chat.
    """
    specials = {*self.tokenizer.special_ids.values()} - {self.tokenizer.unk_id}
    before = [] if not prompt or prompt[-1] in specials else prompt[-_BEFORE:]
    if self.bytes is None:
      return _Words(self.tokenizer, before)
    return _Bytes(self.tokenizer, self.bytes, before)


class _Decoder(Protocol):
  """The text of tokens, one after the other.

  Attributes:
    unfinished: Whether the last token ends in a part of a character.
  """

  unfinished: bool

  def add(self, token: int) -> str:
    """The text that a token adds, without the part of a character that it ends in."""
    ...

  def end(self) -> str:
    """The text of the part of a character at the end."""
    ...


class _Bytes:
  """Decodes tokens by their bytes.

  A text that a library decodes does not tell which characters are unfinished. One of two bytes is
  U+FFFD in some, two of them in others, and makes the characters before it U+FFFD in others again.
  """

  def __init__(self, tokenizer: Tokenizer, data: Sequence[bytes], before: Sequence[int]):
    self._decode, self._data = tokenizer.decode, data
    self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    self._utf8.decode(b"".join(map(self._of, before)))
    self.unfinished = self._is_in_prompt = bool(self._utf8.getstate()[0])
    self._first: list[int] | None = None if before else []  # tokens up to the first but spaces
    self._spaces = 0  # that these add up to

  def add(self, token: int) -> str:
    """See `_Decoder`."""
    text = self._utf8.decode(self._of(token))
    self.unfinished = bool(self._utf8.getstate()[0])
    if self._first is not None:
      text = self._trimmed(self._first, token, text)
    return self._without_prompt(text)

  def end(self) -> str:
    """See `_Decoder`."""
    return self._without_prompt(self._utf8.decode(b"", final=True))

  def _of(self, token: int) -> bytes:
    return self._data[token] if token < len(self._data) else b""

  def _trimmed(self, first: list[int], token: int, text: str) -> str:
    """The text of a token after spaces alone, without those that the tokenizer drops there."""
    first.append(token)
    whole, body = self._decode(first), text.lstrip(" ")
    spaces = len(whole) - len(whole.lstrip(" "))
    added, self._spaces = max(spaces - self._spaces, 0), spaces
    if body or self.unfinished:
      self._first = None
    return " " * added + body

  def _without_prompt(self, text: str) -> str:
    """Leaves out what the prompt's last character became if the text did not finish it."""
    if text and self._is_in_prompt:
      self._is_in_prompt = False
      return text.removeprefix(_HALF)
    return text


class _Words:
  """Decodes tokens together with those before them, on which their spaces depend."""

  unfinished = False

  def __init__(self, tokenizer: Tokenizer, before: Sequence[int]):
    self._decode = tokenizer.decode
    self._window = list(before)  # the tokens that are decoded together
    self._shown = len(self._decode(self._window))  # characters of them that are texts already
    self._last = len(self._window)  # tokens of the window that the next window leaves out

  def add(self, token: int) -> str:
    """See `_Decoder`."""
    self._window.append(token)
    text = self._decode(self._window)[self._shown :]
    self._shown += len(text)
    if after := self._decode(self._window[self._last :]):  # the next token follows these alone
      del self._window[: self._last]
      self._last, self._shown = len(self._window), len(after)
    return text

  def end(self) -> str:
    """See `_Decoder`."""
    return ""


class Text:
  """The text of a request as its tokens come in.

  A token is released once no later one changes its text: neither completes its last character, nor
  makes it a part of a stop string.
  """

  def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int], stop: Sequence[str]):
    """Args: vocabulary: Of the run. prompt: Token ids. stop: Strings that end the text."""
    self._decoder, self._stop = vocabulary.after(prompt), tuple(filter(None, stop))
    self._held = list[Token]()
    self._halves = 0  # the last of the held tokens, which end in half a character

  def add(self, token: Token) -> tuple[list[Token], bool]:
    """Adds a token, whose text is filled in.

    Returns:
      (tokens that are released, whether a stop string ends the text).
    """
    text = self._decoder.add(token.id)
    self._held.append(token._replace(text=text))
    # At most three bytes of a character wait for the fourth.
    self._halves = min(self._halves + 1, 3) if self._decoder.unfinished else 0
    return self._released()

  def end(self) -> list[Token]:
    """Releases what was held back, at the end of the text."""
    if self._held:
      rest, self._halves = self._decoder.end(), 0
      self._held[-1] = self._held[-1]._replace(text=self._held[-1].text + rest)
      released, stopped = self._released()
      return released if stopped else released + self._held
    return []

  def _released(self) -> tuple[list[Token], bool]:
    text = "".join(token.text for token in self._held)
    cut = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=-1)
    if cut >= 0:
      return self._before(cut), True
    safe = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
    out, at = list[Token](), 0
    while len(self._held) > self._halves and at + len(self._held[0].text) <= safe:
      at += len(self._held[0].text)
      out.append(self._held.pop(0))
    return out, False

  def _before(self, cut: int) -> list[Token]:
    """The held tokens that begin before a character, the last one cut there."""
    out, at = list[Token](), 0
    for token in self._held:
      if at >= cut:
        break
      out.append(token._replace(text=token.text[: cut - at]))
      at += len(token.text)
    self._held.clear()
    return out


def _overlap(text: str, stop: str) -> int:
  """Length of the longest end of a text that begins a stop string."""
  for length in range(min(len(text), len(stop) - 1), 0, -1):
    if text.endswith(stop[:length]):
      return length
  return 0
