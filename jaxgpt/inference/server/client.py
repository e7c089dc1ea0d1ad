"""The pieces of a call on their way to one client.

What the engine has drawn and the client has not read yet waits in an `Inbox`. Neighbouring pieces
of a choice are joined there, so a client that reads slowly gets fewer and larger chunks. Beyond a
size the call ends with an error: no client can make the server hold more than that.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxgpt.inference.engine.requests import ERROR, LENGTH, STOP, Piece
from jaxgpt.inference.server.answers import Part, Writer
from jaxgpt.inference.server.calls import Call
from jaxgpt.inference.server.fields import RequestError
from jaxgpt.inference.server.metrics import Metrics
from jaxgpt.inference.server.worker import Job, Worker
from jaxgpt.storage import strict_json

T = TypeVar("T")

MOST_WAITING = 1 << 20  # bytes of text and log-probabilities that a client has not read
KEEP_ALIVE = 15.0  # seconds without a token after which a stream gets a comment
STALLED = 60.0  # seconds after which a client that reads nothing is cut off


class Disconnected(Exception):
  """The client has gone."""


def server_error(message: str, status: int = 500, code: str | None = None) -> RequestError:
  """An error of the server, not of the request."""
  return RequestError(message, status=status, kind="server_error", code=code)


class Inbox:
  """The parts of a call's choices that wait for the client. Belongs to the event loop."""

  def __init__(
    self,
    call: Call,
    worker: Worker,
    metrics: Metrics,
    seconds: float,
    most_waiting: int = MOST_WAITING,
  ):
    """Queues the call's requests.

    Args:
      call: The call.
      worker: Runs the engine.
      metrics: Is told of each token.
      seconds: Time after which the call ends with an error.
      most_waiting: Bytes that may wait for the client.

    Raises:
      worker.Full: The queue has no room for them.
    """
    self._worker, self._most = worker, most_waiting
    self._waiting: dict[int, Part] = {}  # choice -> its text
    self._size, self._open = 0, len(call.requests)
    self._news = asyncio.Event()
    self._error: RequestError | None = None
    self._jobs = [
      Job(request, functools.partial(self._receive, i)) for i, request in enumerate(call.requests)
    ]
    worker.submit(self._jobs)
    self._metrics = metrics
    self._begin = time.monotonic()
    self._last: dict[int, float] = {}  # choice -> when its last token came
    late = server_error(
      f"the answer took more than {seconds:g} seconds; ask for fewer tokens, or start the server "
      "with a larger --timeout",
      504,
      "timeout",
    )
    self._timer = asyncio.get_running_loop().call_later(seconds, self.fail, late)

  def _receive(self, choice: int, piece: Piece) -> None:
    finish = piece.finish
    if finish and finish not in (STOP, LENGTH):
      self.fail(server_error(finish.removeprefix(ERROR)))
      return
    part = Part(choice, piece.text, piece.tokens, finish)
    if piece.tokens:
      now = time.monotonic()
      self._metrics.drawn(len(piece.tokens), now, self._begin, self._last.get(choice))
      self._last[choice] = now
    self._size += part.size
    self._open -= bool(finish)
    if choice in self._waiting:
      self._waiting[choice].join(part)
    else:
      self._waiting[choice] = part
    if self._size > self._most:
      slow = f"more than {self._most:,} bytes of the answer wait to be read; read faster"
      self.fail(server_error(slow, code="slow_reader"))
    self._news.set()

  def fail(self, error: RequestError) -> None:
    """Ends the call with an error. Text that still waits is dropped."""
    self.close()
    self._waiting.clear()
    self._error = self._error or error
    self._news.set()

  def close(self) -> None:
    """Ends what still runs."""
    self._timer.cancel()
    for job in self._jobs:
      self._worker.cancel(job)

  @property
  def ended(self) -> bool:
    """Whether all text has been taken."""
    return not (self._open or self._waiting or self._error)

  async def take(self, seconds: float | None = None) -> list[Part]:
    """Waits for text and takes all that there is: one part a choice. [] after so many seconds.

    Raises:
      RequestError: The engine failed, the call took too long, or its text was not read.
    """
    try:
      async with asyncio.timeout(seconds):
        await self._news.wait()
    except TimeoutError:
      return []
    self._news.clear()
    if self._error:
      raise self._error
    found, self._waiting, self._size = self._waiting, {}, 0
    return list(found.values())


async def until_gone(receive: Receive) -> None:
  """Returns when the client has closed the connection."""
  while (await receive())["type"] != "http.disconnect":
    pass


async def collect(inbox: Inbox, writer: Writer, receive: Receive) -> dict[str, Any]:
  """Waits for all of a call's text: the whole response.

  Raises:
    Disconnected: The client did not wait for it.
    RequestError: See `Inbox.parts`.
  """

  async def gather() -> None:
    while not inbox.ended:
      for part in await inbox.take():
        writer.add(part)

  try:
    async with _running(gather()) as all_text, _running(until_gone(receive)) as gone:
      await asyncio.wait({all_text, gone}, return_when=asyncio.FIRST_COMPLETED)
      if not all_text.done():
        raise Disconnected
      await all_text
  finally:
    inbox.close()
  return writer.response()


@contextlib.asynccontextmanager
async def _running(work: Coroutine[Any, Any, T]) -> AsyncIterator["asyncio.Task[T]"]:
  """A task that is cancelled, if it still runs, when the block is left."""
  task = asyncio.ensure_future(work)
  try:
    yield task
  finally:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
      task.exception()  # else asyncio reports that nobody looked at it


class Stream(Response):
  """A response of server-sent events: the chunks of a call as they come."""

  media_type = "text/event-stream"

  def __init__(
    self, inbox: Inbox, writer: Writer, done: Callable[[int], None], stalled: float = STALLED
  ):
    """Prepares the response.

    Args:
      inbox: The call's text.
      writer: Writes the chunks.
      done: Called at the end with the status: 200, 499 for a client that left, 5xx.
      stalled: Seconds after which a client that reads nothing is cut off.
    """
    self.status_code, self.background = 200, None
    self._inbox, self._writer, self._done, self._stalled = inbox, writer, done, stalled
    self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

  def init_headers(self, headers: Any = None) -> None:
    """See `Response`. The length is not known."""
    found = {"content-type": f"{self.media_type}; charset=utf-8", **(headers or {})}
    self.raw_headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in found.items()]

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the events. Ends the engine's work if the client leaves or reads nothing."""
    status = 499
    try:
      async with _running(until_gone(receive)) as gone, _running(self._send(send)) as sending:
        await asyncio.wait({gone, sending}, return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
          status = await sending
    except TimeoutError:  # nothing more can be sent: the response breaks off
      abort(scope)
      await asyncio.sleep(0)  # the connection learns that it is lost
    finally:
      self._inbox.close()
      self._done(status)

  async def _send(self, send: Send) -> int:
    await self._push(
      send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
    )
    status = 200
    try:
      await self._events(send, self._writer.first())
      while not self._inbox.ended:
        parts = await self._inbox.take(KEEP_ALIVE)
        if not parts:
          await self._body(send, b": waiting\n\n")
        await self._events(send, [chunk for part in parts for chunk in self._writer.chunks(part)])
      await self._events(send, self._writer.last())
      await self._body(send, b"data: [DONE]\n\n")
    except RequestError as e:
      status = e.status
      await self._events(send, [e.body])
    await self._body(send, b"", more=False)
    return status

  async def _events(self, send: Send, values: Sequence[dict[str, Any]]) -> None:
    text = "".join(
      f"data: {strict_json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
      for value in values
    )
    if text:
      await self._body(send, text.encode())

  async def _body(self, send: Send, data: bytes, more: bool = True) -> None:
    await self._push(send, {"type": "http.response.body", "body": data, "more_body": more})

  async def _push(self, send: Send, message: Any) -> None:
    async with asyncio.timeout(self._stalled):
      await send(message)


def abort(scope: Scope) -> None:
  """Closes a connection without waiting for its client, see `serving.Connection`."""
  if close := scope.get("state", {}).get("abort"):
    close()
