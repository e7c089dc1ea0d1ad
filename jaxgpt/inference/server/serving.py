"""The server as a process: its socket, its connections, and its end.

The first SIGTERM or SIGINT lets the server finish: requests that it has accepted get their whole
answers, new ones the status 503. A second one ends it at once.
"""

import asyncio
import logging
import socket
import types
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxgpt.errors import UserError
from jaxgpt.inference.server.app import App
from jaxgpt.inference.server.client import STALLED
from jaxgpt.inference.server.fields import RequestError
from jaxgpt.inference.server.worker import Worker
from jaxgpt.storage import strict_json

HEADER_SECONDS = 30.0  # for a client to send the head of a request
_MOST_HEADERS = 32 << 10  # bytes
_MOST_CONNECTIONS = 1024


class Connection(H11Protocol):
  """A connection that no client can hold open by sending or reading nothing.

  The application finds `abort` in the state of a request's scope. It closes the connection without
  waiting until the client has read what was sent.
  """

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self.app_state = {**self.app_state, "abort": self._abort}
    self._head_timer: asyncio.TimerHandle | None = None

  def connection_made(self, transport: Any) -> None:
    """See `asyncio.Protocol`."""
    super().connection_made(transport)
    self._head_timer = self.loop.call_later(HEADER_SECONDS, self._abort)

  def data_received(self, data: bytes) -> None:
    """Gives the client a time to send the rest of a head."""
    super().data_received(data)
    if self.cycle and not self.cycle.response_complete:  # a request is there
      self._end_head_timer()
    elif not self._head_timer:  # more data gives no more time
      self._head_timer = self.loop.call_later(HEADER_SECONDS, self._abort)

  def connection_lost(self, exc: Exception | None) -> None:
    """See `asyncio.Protocol`."""
    self._end_head_timer()
    super().connection_lost(exc)

  def on_response_complete(self) -> None:
    """Gives the client a time to read the rest of a response."""
    super().on_response_complete()
    if self.transport.get_write_buffer_size():
      self.loop.call_later(STALLED, self._abort_unread, self.cycle)

  def _abort(self) -> None:
    self.transport.abort()

  def _end_head_timer(self) -> None:
    if self._head_timer:
      self._head_timer.cancel()
      self._head_timer = None

  def _abort_unread(self, cycle: Any) -> None:
    if cycle is self.cycle and self.transport.get_write_buffer_size():
      self._abort()

  def send_400_response(self, msg: str) -> None:
    """Answers what is not HTTP, in the form of the other errors."""
    body = strict_json.dumps(RequestError(msg).body).encode()
    self.transport.write(
      b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
      b"content-length: %d\r\n\r\n%s" % (len(body), body)
    )
    self.transport.close()


class _Server(uvicorn.Server):
  """A server that finishes what it has accepted before it stops."""

  def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]):
    super().__init__(config)
    self._on_signal, self._signals = on_signal, 0
    self._loop = asyncio.get_running_loop()

  def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
    """Handles SIGTERM and SIGINT."""
    del sig, frame
    self._signals += 1
    if self._signals > 1:
      logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # each request breaks off
      self.force_exit = self.should_exit = True
      self._loop.call_soon_threadsafe(self._break_off)
    else:
      self._on_signal()

  async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
    """See `uvicorn.Server`."""
    if self.force_exit:
      self._break_off()
    await super().shutdown(sockets)

  def _break_off(self) -> None:
    """Closes all connections, for which Python would wait otherwise, from 3.12 on."""
    for connection in list(self.server_state.connections):
      connection.transport.abort()


def bind(host: str, port: int) -> socket.socket:
  """A socket that listens at an address.

  Args:
    host: Name or number of the address.
    port: 0: any that is free.

  Raises:
    UserError: There is no such address here, or the port is taken.
  """
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family, backlog=_MOST_CONNECTIONS)
  except OSError as e:
    raise UserError(
      f"--host={host} --port={port}: {e.strerror or e}; choose another port (0: any that is free), "
      "or an address of this machine"
    ) from e


def run(
  make_app: Callable[[], App],
  worker: Worker | None,
  listener: socket.socket,
  report: Callable[[str], None],
  started: Callable[[Callable[[], None]], None] = lambda stop: None,
) -> int:
  """Serves until a signal ends it.

  Args:
    make_app: Makes the application, in the event loop.
    worker: Runs the engine. None: the model writes no text.
    listener: From `bind`.
    report: Takes lines for the user.
    started: Called once it serves, with a function that any thread may call instead of a signal.

  Returns:
    The exit code: 1 if the engine failed, or a second signal ended the server before its requests.
  """
  return asyncio.run(_run(make_app, worker, listener, report, started))


async def _run(
  make_app: Callable[[], App],
  worker: Worker | None,
  listener: socket.socket,
  report: Callable[[str], None],
  started: Callable[[Callable[[], None]], None],
) -> int:
  logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
  app, loop = make_app(), asyncio.get_running_loop()
  tasks = set[asyncio.Task[None]]()

  async def finish() -> None:
    await app.drain()
    server.should_exit = True

  def begin_to_finish() -> None:
    waiting = worker.jobs if worker else 0
    first = f": first {waiting} texts are finished; a second signal stops at once"
    report(f"stopping{first if waiting else ''}")
    tasks.add(loop.create_task(finish()))

  config = uvicorn.Config(
    app.asgi,
    http=Connection,
    ws="none",
    loop="asyncio",
    lifespan="off",
    log_config=None,
    access_log=False,
    server_header=False,
    timeout_keep_alive=30,
    h11_max_incomplete_event_size=_MOST_HEADERS,
    backlog=_MOST_CONNECTIONS,
  )

  def stop() -> None:
    loop.call_soon_threadsafe(begin_to_finish)

  server = _Server(config, stop)
  if worker:
    worker.start(lambda: setattr(server, "should_exit", True))
  started(stop)
  try:
    await server.serve([listener])
  finally:
    if worker and not server.force_exit:
      worker.stop()
    app.close()
  if server.force_exit:
    report("stopped before all texts were finished")
  return int(server.force_exit or (worker is not None and worker.failed))
