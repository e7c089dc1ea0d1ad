"""Pieces of text to OpenAI's JSON: whole responses, and the chunks of a stream.

A choice's text grows by parts. `Writer` turns the parts of all choices of a call into chunks, or
collects them into one response.
"""

import dataclasses
import secrets
import time
from collections.abc import Callable
from typing import Any

from jaxgpt.inference.engine.requests import Token
from jaxgpt.inference.server.calls import Call, Served

_BROKEN = "�"  # a token that is a part of a character


@dataclasses.dataclass
class Part:
  """New text of a choice.

  Attributes:
    choice: Its number in the call.
    text: The text.
    tokens: The tokens that were drawn.
    finish: 'stop' or 'length' if the choice ends here.
  """

  choice: int
  text: str
  tokens: tuple[Token, ...]
  finish: str | None

  def join(self, other: "Part") -> None:
    """Appends the part that follows."""
    self.text += other.text
    self.tokens += other.tokens
    self.finish = other.finish

  @property
  def size(self) -> int:
    """About the bytes that it takes until it is sent."""
    return len(self.text) + sum(100 * (1 + len(token.alternatives)) for token in self.tokens)


class Writer:
  """Writes the response to one call.

  Attributes:
    tokens: Number of tokens drawn so far.
  """

  def __init__(self, call: Call, served: Served):
    """Args: call: The call. served: The model."""
    self._call, self._served = call, served
    self._logprobs = call.logprobs
    prefix = "chatcmpl" if call.chat else "cmpl"
    kind = "chat.completion" if call.chat else "text_completion"
    if call.chat and call.stream:
      kind += ".chunk"
    self._head = {
      "id": f"{prefix}-{secrets.token_hex(12)}",
      "object": kind,
      "created": int(time.time()),
      "model": served.name,
      "system_fingerprint": served.fingerprint,
    }
    self._offsets = [0] * len(call.requests)  # characters of each choice so far
    self._parts = [Part(i, "", (), None) for i in range(len(call.requests))]
    self.tokens = 0

  def first(self) -> list[dict[str, Any]]:
    """The chunks with which a stream begins: in a chat, the role of each message."""
    if not self._call.chat:
      return []
    return [
      self._chunk({"index": i, "delta": {"role": "assistant", "content": ""}}, None)
      for i in range(len(self._parts))
    ]

  def chunks(self, part: Part) -> list[dict[str, Any]]:
    """The chunks of a stream for new text of a choice."""
    self.tokens += len(part.tokens)
    found = self._logprobs_of(part) if self._logprobs and part.tokens else None
    out = []
    if not self._call.chat:
      choice = {"index": part.choice, "text": part.text, "logprobs": found}
      return [self._chunk(choice, part.finish)]
    if part.text or found:
      choice = {"index": part.choice, "delta": {"content": part.text}, "logprobs": found}
      out.append(self._chunk(choice, None))
    if part.finish:
      out.append(self._chunk({"index": part.choice, "delta": {}, "logprobs": None}, part.finish))
    return out

  def last(self) -> list[dict[str, Any]]:
    """The chunk with the number of tokens, if the call asks for it."""
    if not self._call.usage:
      return []
    return [{**self._head, "choices": [], "usage": self._usage()}]

  def add(self, part: Part) -> None:
    """Keeps new text of a choice for `response`."""
    self.tokens += len(part.tokens)
    self._parts[part.choice].join(part)

  def response(self) -> dict[str, Any]:
    """The whole response, once all choices have ended."""
    choices = []
    for index, part in enumerate(self._kept()):
      found = self._logprobs_of(part) if self._logprobs else None
      choice: dict[str, Any] = {"index": index, "finish_reason": part.finish, "logprobs": found}
      if self._call.chat:
        choice["message"] = {"role": "assistant", "content": part.text, "refusal": None}
      else:
        choice["text"] = part.text
      choices.append(choice)
    return {**self._head, "choices": choices, "usage": self._usage()}

  def _kept(self) -> list[Part]:
    """The choices to return: of each prompt, those whose tokens are likeliest on average."""
    keep, of_each = self._call.keep, len(self._parts) // self._call.prompts
    if keep == of_each:
      return self._parts
    out = []
    for start in range(0, len(self._parts), of_each):
      out += sorted(self._parts[start : start + of_each], key=_mean_logprob, reverse=True)[:keep]
    return out

  def _chunk(self, choice: dict[str, Any], finish: str | None) -> dict[str, Any]:
    chunk = {**self._head, "choices": [{"logprobs": None, **choice, "finish_reason": finish}]}
    return {**chunk, "usage": None} if self._call.usage else chunk

  def _usage(self) -> dict[str, int]:
    prompt = self._call.prompt_tokens
    return {
      "prompt_tokens": prompt,
      "completion_tokens": self.tokens,
      "total_tokens": prompt + self.tokens,
    }

  def _logprobs_of(self, part: Part) -> dict[str, Any]:
    if self._call.chat:
      return {
        "content": [_chat_logprob(token, self._served.token_text) for token in part.tokens],
        "refusal": None,
      }
    return self._legacy(part)

  def _legacy(self, part: Part) -> dict[str, Any]:
    """The log-probabilities of a completion, whose form differs from that of a chat."""
    name = self._served.token_text
    offsets = []
    for token in part.tokens:
      offsets.append(self._offsets[part.choice])
      self._offsets[part.choice] += len(token.text)
    return {
      "tokens": [token.text or name(token.id) for token in part.tokens],
      "token_logprobs": [token.logprob for token in part.tokens],
      # The drawn token is there too where it is not among the most likely.
      "top_logprobs": [
        {name(i): logprob for i, logprob in token.alternatives if i != token.id}
        | {_text(token, token.id, name): token.logprob}
        for token in part.tokens
      ],
      "text_offset": offsets,
    }


def _text(token: Token, i: int, name: Callable[[int], str]) -> str:
  """The text of one of a token's alternatives. The token itself has the text that it adds."""
  return (token.text if i == token.id else "") or name(i)


def _chat_logprob(token: Token, name: Callable[[int], str]) -> dict[str, Any]:
  def entry(i: int, logprob: float | None) -> dict[str, Any]:
    text = _text(token, i, name)
    data = None if _BROKEN in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": data}

  best = [entry(i, logprob) for i, logprob in token.alternatives]
  return {**entry(token.id, token.logprob), "top_logprobs": best}


def _mean_logprob(part: Part) -> float:
  found = [token.logprob for token in part.tokens if token.logprob is not None]
  return sum(found) / len(found) if found else float("-inf")
