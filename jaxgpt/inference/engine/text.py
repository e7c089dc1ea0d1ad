"""From tokens to text as they are drawn: whole characters, whole tokens, stop strings held back."""

from collections.abc import Sequence

from jaxgpt.inference.engine.requests import Token
from jaxgpt.text.tokenizers.base import Tokenizer

_BEFORE = 8  # tokens of the prompt that are decoded along, for the space before a word
_HALF = "\ufffd"  # bytes that are not a whole character decode to this


class Text:
  """The text of a request as its tokens come in.

  A token is released once no later one changes its text: neither completes its last character, nor
  makes it a part of a stop string.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
    """Args: tokenizer: Of the run. prompt: Token ids. stop: Strings that end the text."""
    self._tokenizer, self._stop = tokenizer, tuple(filter(None, stop))
    self._window = list(prompt[-_BEFORE:])  # the tokens that are decoded together
    self._shown = len(self._whole())  # characters of the window that are tokens' texts already
    self._last = len(self._window)  # tokens of the window that the next window leaves out
    self._held = list[Token]()
    self._halves = 0  # the last of the held tokens, which end in half a character

  def add(self, token: Token) -> tuple[list[Token], bool]:
    """Adds a token, whose text is filled in.

    Returns:
      (tokens that are released, whether a stop string ends the text).
    """
    self._window.append(token.id)
    whole = self._whole()
    stable = whole[:-1] if whole.endswith(_HALF) else whole
    self._held.append(token._replace(text=stable[self._shown :]))
    self._shown = max(self._shown, len(stable))
    self._halves = 0 if stable == whole else self._halves + 1
    after = self._tokenizer.decode(self._window[self._last :])
    if stable == whole and after:  # the next token is decoded after these alone
      del self._window[: self._last]
      self._last, self._shown = len(self._window), len(after)
    return self._released()

  def end(self) -> list[Token]:
    """Releases what was held back, at the end of the text."""
    if self._held:
      rest, self._halves = self._whole()[self._shown :], 0
      self._held[-1] = self._held[-1]._replace(text=self._held[-1].text + rest)
      released, stopped = self._released()
      return released if stopped else released + self._held
    return []

  def _whole(self) -> str:
    return self._tokenizer.decode(self._window)

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
