"""An engine whose texts follow from their requests alone, so that a mixed-up answer is noticed.

A prompt is UTF-8 bytes. Words of it direct the engine:

    tokens=N   the text has N tokens (8 without it)
    fails      the request ends with an error
    breaks     the step raises an exception
"""

import re
import threading
import time
import zlib

from jaxgpt.errors import UserError
from jaxgpt.inference.engine.requests import LENGTH, STOP, Piece, Stats, Token
from jaxgpt.inference.sampling import Sampling
from jaxgpt.inference.server import calls

CONTEXT = 4096


def script(prompt: bytes, seed: int = 0) -> list[str]:
  """The tokens of the text of a prompt."""
  found = re.search(rb"tokens=(\d+)", prompt)
  count = int(found[1]) if found else 8
  name = zlib.crc32(prompt + f"{seed if b'seeded' in prompt else ''}".encode()) % 100_000
  return [f"{name}.{i} " for i in range(count)]


class FakePrompts:
  """Texts and conversations as bytes."""

  def text(self, prompt):
    return list(prompt.encode()) or [0]

  def chat(self, messages, tools=None, variables=None):
    if messages[-1]["content"] == "refuse":
      raise UserError("the chat template refuses a conversation")
    text = "\n".join(f"{m['role']}: {m.get('content')}" for m in messages)
    if tools:
      text += f"\ntools: {len(tools)}"
    if variables:
      text += f"\nvariables: {sorted(variables.items())}"
    return list(text.encode())


class FakeEngine:
  """Draws one scripted token of each of `rows` requests in a step of `seconds`."""

  def __init__(self, rows: int = 8, seconds: float = 0.0):
    self.rows, self.seconds = rows, seconds
    self.requests, self.cancelled, self.threads = [], [], set()
    self._running = {}  # number -> [request, tokens, how many are written]
    self._steps = 0
    self.paused = threading.Event()  # set: steps do nothing

  def check(self, request):
    if b"forbidden" in bytes(request.prompt):
      raise UserError("the engine refuses this request")

  def add(self, request):
    if b"refused late" in bytes(request.prompt):
      raise UserError("the engine refuses this request after all")
    self.threads.add(threading.get_ident())
    self.requests.append(request)
    number = len(self.requests)
    self._running[number] = [request, script(bytes(request.prompt), request.seed), 0]
    return number

  def cancel(self, number):
    self.cancelled.append(number)
    self._running.pop(number, None)

  @property
  def busy(self):
    return bool(self._running)

  def stats(self):
    running = min(len(self._running), self.rows)
    return Stats(running, len(self._running) - running, 64, running, 0, 0, self._steps)

  def step(self):
    self.threads.add(threading.get_ident())
    time.sleep(self.seconds)
    if self.paused.is_set():
      time.sleep(0.005)
      return []
    self._steps += 1
    out = []
    for number, row in list(self._running.items())[: self.rows]:
      request, tokens, i = row
      prompt = bytes(request.prompt)
      if b"breaks" in prompt:  # as a call does that fails on the device: when it is read
        row[2] += 1
        if row[2] < 2:
          continue
        raise RuntimeError("the device is gone")
      if b"fails" in prompt:
        out.append(Piece(number, "", (), "error: no block is free"))
      elif i == len(tokens):
        out.append(Piece(number, "", (), STOP))
      else:
        out.append(self._piece(number, request, tokens, i))
        row[2] += 1
      if out[-1].finish:
        del self._running[number]
    return out

  def _piece(self, number, request, tokens, i):
    text, alternatives, logprob = tokens[i], (), None
    if request.logprobs is not None:
      logprob = -0.5 - i / 100 - (request.seed % 7 if b"seeded" in bytes(request.prompt) else 0)
      alternatives = tuple((65 + k, logprob - k) for k in range(request.logprobs))
    for stop in request.stop:
      if stop in text:
        return Piece(number, text[: text.index(stop)], (Token(66, text, logprob),), STOP)
    finish = LENGTH if i + 1 == request.max_new else None
    return Piece(number, text, (Token(66, text, logprob, alternatives),), finish)


def served(engine, most_choices=72, chats=True, embed=None, writes=True):
  """The fake engine as a model of the server."""
  return calls.Served(
    name="fake",
    fingerprint="step 1",
    created=1,
    context=CONTEXT if writes else 0,
    vocab_size=256,
    chats=chats,
    prompts=FakePrompts() if writes else None,
    defaults=Sampling(),
    token_text=lambda i: f"<{i}>",
    check=engine.check,
    most_choices=most_choices,
    embed=embed,
  )
