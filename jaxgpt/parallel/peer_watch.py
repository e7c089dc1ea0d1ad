"""A line from each process of a run to the first, so that they end together and say why.

A collective in which one process is missing waits for ever, or until a heartbeat runs out minutes
later with a stack trace for a message. The lines are plain TCP: when a process is killed its end
closes at once, and a process that fails says so before it goes. The first process passes each
notice on to the others.
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
from typing import NamedTuple

EXIT_LOST = 75  # EX_TEMPFAIL of sysexits.h: try again
_GRACE = 1.5  # seconds in which processes with the same error come to it by themselves
_CONNECT = 30  # seconds
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}  # a machine that vanished


class Notice(NamedTuple):
  """Why a run ends: the process, its exit code, and its message (None: it was lost)."""

  process: int
  code: int
  message: str | None


def listen():
  """A listening socket on any free port, for the first process."""
  if socket.has_dualstack_ipv6():
    return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
  return socket.create_server(("", 0))


class Lifeline:
  """This process's end of its line; in the first process, the ends of all."""

  def __init__(self, me, names, address, token, listener=None, leave=None):
    """Connects, and watches from a thread of its own. The first process waits for the others.

    Args:
      me: this process's number.
      names: what to call each process, in their order.
      address: (host, port) of the first process's listening socket.
      token: a secret that all share, so that nobody else is taken for a process.
      listener: the socket itself, in the first process.
      leave: called with the notice that ends the run; default: says it and ends this process.
    """
    self._me, self._names, self._leave = me, names, leave or self._end_process
    self._token, self._listener = token, listener
    self._notice, self._arrived, self._lock = None, threading.Event(), threading.Lock()
    self._failing = self._said = False
    self._over = set()  # processes that ended as they should
    self._lines = {}  # process -> socket
    if listener is None:
      self._connect(address)
    threading.Thread(target=self._watch, daemon=True, name="lifeline").start()
    until = time.monotonic() + _CONNECT
    while listener is not None and len(self._lines) < len(names) - 1 and time.monotonic() < until:
      time.sleep(0.01)

  def _connect(self, address):
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

  def done(self):
    """Says that this process ends as it should; from then on no loss concerns it."""
    self._over.update(range(len(self._names)))
    self._tell({"over": True})

  def fail(self, message, code):
    """Tells all processes that this one ends with an error.

    Returns:
      The notice that the run ends with, this one or an earlier one; None where the first process
      does not answer.
    """
    self._failing = True
    mine = Notice(self._me, code, message)
    if self._listener is not None:
      return self._pass_on(mine)
    self._tell(mine._asdict())
    return self.wait(_GRACE + 5)

  def wait(self, seconds=_GRACE):
    """The notice that has arrived, or arrives in time; or None."""
    self._arrived.wait(seconds)
    return self._notice

  def _tell(self, message):
    for line in list(self._lines.values()):
      _send(line, message)

  def _watch(self):
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

  def _accept(self, selector):
    line, _ = self._listener.accept()
    _keep_alive(line)
    selector.register(line, selectors.EVENT_READ, (None, bytearray()))

  def _read(self, selector, key):
    process, buffer = key.data
    try:
      data = key.fileobj.recv(65536)
    except OSError:
      data = b""
    if not data:
      selector.unregister(key.fileobj)
      self._lines.pop(process, None)
      if process is not None and process not in self._over:
        self._pass_on(Notice(process, EXIT_LOST, None), leave=True)
      return
    buffer += data
    while b"\n" in buffer:
      line, _, rest = buffer.partition(b"\n")
      buffer[:] = rest
      process = self._take(process, key.fileobj, line)
    selector.modify(key.fileobj, selectors.EVENT_READ, (process, buffer))

  def _take(self, process, line, text):
    """One message; returns whose line it is, None as long as that is not known."""
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

  def _pass_on(self, notice, leave=False):
    """The first notice counts, and in the first process goes to all others."""
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

  def _end_process(self, notice):
    """Says why, where nobody else does, and ends: the main thread may hang in a collective."""
    if notice.message is not None:
      time.sleep(_GRACE)  # the main thread may be coming to the same error
      if self._failing:
        return
    if notice.message is None or self._me == 0:
      self.announce(self.describe(notice))
    self.leave(notice.code)

  def announce(self, message):
    """Says why this process ends, but once: the main thread and the watching one may both know."""
    with self._lock:
      if not self._said:
        say(message)
      self._said = True

  def leave(self, code):
    """Ends this process; the first one, which JAX's runtime hangs on, after the others."""
    until = time.monotonic() + _GRACE + 5
    while self._listener is not None and self._lines and time.monotonic() < until:
      time.sleep(0.05)
    leave(code)

  def describe(self, notice):
    """The notice as a line for people."""
    name = self._names[notice.process]
    if notice.message is None:
      return (
        f"{name} was lost (killed, out of memory, or its machine is gone): all processes end; "
        "the same command goes on from the newest checkpoint"
      )
    return notice.message if notice.process == self._me else f"{name}: {notice.message}"


def leave(code):
  """Ends this process now: without the others, JAX's own way out would wait for them."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError):
      stream.flush()
  os._exit(code)


def say(message, kind="error"):
  """One line to standard error, in one write, so that lines of processes do not mix."""
  os.write(2, f"jaxgpt: {kind}: {message}\n".encode())


def _send(line, message):
  with contextlib.suppress(OSError):  # its end is gone: the watching thread sees that as well
    line.sendall(json.dumps(message).encode() + b"\n")


def _keep_alive(line):
  line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in _KEEPALIVE.items():
    if hasattr(socket, name):  # not on every system
      line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
