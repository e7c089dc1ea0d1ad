"""Peer watch: ends all processes of a run together when one fails or dies, with one clear message.

A collective with a missing participant blocks forever, or until a heartbeat expires minutes later
with a stack trace. So each process keeps a plain TCP connection to process 0:

        process 1 ───┐
        process 2 ───┼───► process 0
        process 3 ───┘

A process that raises an error sends a notice before it exits. A process that is killed sends
nothing, but the kernel closes its connection at once, which counts as a notice. Process 0 forwards
the first notice to all others, and every process exits with the notice's code. A background thread
does this, because the main thread may be stuck in a collective. If process 0 itself dies, all
connections close and the others exit.

Two processes often fail at the same time, with the same error or as a consequence of each other.
The first notice that reaches process 0 counts for all, and a short grace period lets the others
arrive at their own error, so that the error is printed only once.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from jaxgpt.errors import EXIT_AGAIN

EXIT_LOST = EXIT_AGAIN
_GRACE = 1.5  # seconds for processes to reach the same error on their own
_CONNECT = 30  # seconds to connect
# Notices a machine that vanished without closing its connections, after about a minute.
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}


class Notice(NamedTuple):
  """The reason that a run ends.

  Attributes:
    process: The process that failed or died.
    code: Exit code for all processes.
    message: The error, or None if the process died without one.
  """

  process: int
  code: int
  message: str | None


def listen() -> socket.socket:
  """A listening socket on any free port, for process 0."""
  if socket.has_dualstack_ipv6():
    return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
  return socket.create_server(("", 0))


class PeerWatch:
  """One process's connection to process 0. In process 0, its connections to all others."""

  def __init__(
    self,
    me: int,
    names: Sequence[str],
    address: tuple[str, int],
    token: str,
    listener: socket.socket | None = None,
    leave: Callable[[Notice], None] | None = None,
  ):
    """Connects and starts the watching thread. Process 0 waits for the others to connect.

    Args:
      me: Number of this process.
      names: Display names of all processes, in order.
      address: (host, port) of process 0's listening socket.
      token: A secret that the processes share, so that no stranger is taken for one of them.
      listener: The listening socket itself, in process 0.
      leave: Called with the notice that ends the run. None: print it and exit.
    """
    self._me, self._names, self._leave = me, names, leave or self._end_process
    self._token, self._listener = token, listener
    self._notice: Notice | None = None
    self._arrived, self._lock = threading.Event(), threading.Lock()
    self._failing = self._announced = False
    self._over: set[int] = set()  # processes that finished without an error
    self._lines: dict[int, socket.socket] = {}  # open connections by process
    if listener is None:
      self._connect(address)
    threading.Thread(target=self._watch, daemon=True, name="peer_watch").start()
    until = time.monotonic() + _CONNECT
    while listener is not None and len(self._lines) < len(names) - 1 and time.monotonic() < until:
      time.sleep(0.01)

  def _connect(self, address: tuple[str, int]) -> None:
    try:
      line = socket.create_connection(address, timeout=_CONNECT)
    except OSError as e:
      say(
        f"{self._names[self._me]} can't reach process 0 at {address[0]}:{address[1]} ({e}); the "
        "run goes on, but notices a lost process later: open the ports between the hosts",
        "warning",
      )
      return
    line.settimeout(None)
    _keep_alive(line)
    _send(line, {"token": self._token, "process": self._me})
    self._lines[0] = line

  def done(self) -> None:
    """Announces that this process finished. From then on it ignores the end of others."""
    self._over.update(range(len(self._names)))
    self._tell({"over": True})

  def fail(self, message: str, code: int) -> Notice | None:
    """Tells all processes that this one ends with an error.

    Returns:
      The notice that the run ends with: this one, or an earlier one. None if process 0 does not
      answer.
    """
    self._failing = True
    mine = Notice(self._me, code, message)
    if self._listener is not None:
      return self._pass_on(mine)
    self._tell(mine._asdict())
    return self.wait(_GRACE + 5)

  def wait(self, seconds: float | None = None) -> Notice | None:
    """Waits for a notice, for some seconds or a grace period, and returns it, or None."""
    self._arrived.wait(_GRACE if seconds is None else seconds)
    return self._notice

  def _tell(self, message: dict[str, Any]) -> None:
    for line in list(self._lines.values()):
      _send(line, message)

  def _watch(self) -> None:
    """The watching thread: reads all connections, and accepts new ones in process 0."""
    with selectors.DefaultSelector() as selector:
      if self._listener is not None:
        selector.register(self._listener, selectors.EVENT_READ)
      for process, line in self._lines.items():
        selector.register(line, selectors.EVENT_READ, (process, bytearray()))
      while True:
        for key, _ in selector.select():
          if key.data is None:
            self._accept(selector)
          else:
            self._read(selector, key)

  def _accept(self, selector: selectors.BaseSelector) -> None:
    assert self._listener is not None
    line, _ = self._listener.accept()
    _keep_alive(line)
    # Which process this is, its first message will say.
    selector.register(line, selectors.EVENT_READ, (None, bytearray()))

  def _read(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    process, buffer = key.data
    line: Any = key.fileobj
    try:
      data = line.recv(65536)
    except OSError:
      data = b""
    if not data:  # the connection is closed
      selector.unregister(line)
      self._lines.pop(process, None)
      if process is not None and process not in self._over:
        self._pass_on(Notice(process, EXIT_LOST, None), leave=True)
      return
    buffer += data
    while b"\n" in buffer:
      text, _, rest = buffer.partition(b"\n")
      buffer[:] = rest
      process = self._take(process, line, text)
    selector.modify(line, selectors.EVENT_READ, (process, buffer))

  def _take(self, process: int | None, line: socket.socket, text: bytes | bytearray) -> int | None:
    """Handles one message.

    Returns:
      The process at the other end, or None as long as it has not shown the token.
    """
    try:
      message = json.loads(text)
    except ValueError:
      return process
    if not isinstance(message, dict):
      return process
    if process is None:
      if secrets.compare_digest(str(message.get("token")), self._token):
        process = int(message["process"])
        self._lines[process] = line
    elif message.get("over"):
      self._over.add(process)
    else:
      self._pass_on(Notice(**message), leave=True)
    return process

  def _pass_on(self, notice: Notice, leave: bool = False) -> Notice | None:
    """Records the first notice, and in process 0 forwards it. Later ones have no effect."""
    with self._lock:
      first = self._notice is None
      if first:
        self._notice = notice
    if first:
      if self._listener is not None:
        self._tell(notice._asdict())
      self._arrived.set()
      if leave:
        threading.Thread(target=self._leave, args=(notice,), daemon=True).start()
    return self._notice

  def _end_process(self, notice: Notice) -> None:
    """Prints the reason if nobody else does, and exits even if the main thread is stuck."""
    if notice.message is not None:
      time.sleep(_GRACE)  # the main thread may be about to raise the same error
      if self._failing:
        return
    if notice.message is None or self._me == 0:
      self.announce(self.describe(notice))
    self.leave(notice.code)

  def announce(self, message: str) -> None:
    """Prints why this process ends, once: both the main and the watching thread may know."""
    with self._lock:
      if not self._announced:
        say(message)
      self._announced = True

  def leave(self, code: int) -> NoReturn:
    """Exits. Process 0 exits last, because JAX's runtime in the others depends on it."""
    until = time.monotonic() + _GRACE + 5
    while self._listener is not None and self._lines and time.monotonic() < until:
      time.sleep(0.05)
    leave(code)

  def describe(self, notice: Notice) -> str:
    """The notice as a line for people."""
    name = self._names[notice.process]
    if notice.message is None:
      return (
        f"{name} was lost (killed, out of memory, or its machine is gone): all processes end; "
        "the same command goes on from the newest checkpoint"
      )
    return notice.message if notice.process == self._me else f"{name}: {notice.message}"


def leave(code: int) -> NoReturn:
  """Exits at once. A normal exit would wait in JAX's shutdown for processes that are gone."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError):
      stream.flush()
  os._exit(code)


def say(message: str, kind: str = "error") -> None:
  """Prints a line to standard error in one write, so that lines of processes do not mix."""
  with contextlib.suppress(OSError):  # a closed terminal
    os.write(2, f"jaxgpt: {kind}: {message}\n".encode())


def _send(line: socket.socket, message: dict[str, Any]) -> None:
  with contextlib.suppress(OSError):  # the watching thread notices a closed connection
    line.sendall(json.dumps(message).encode() + b"\n")


def _keep_alive(line: socket.socket) -> None:
  line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in _KEEPALIVE.items():
    if hasattr(socket, name):  # not on every system
      line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
