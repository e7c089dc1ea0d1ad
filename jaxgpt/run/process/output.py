"""What a run prints. A terminal that is closed or a full disk never ends the run.

Within `lasting()` no write to standard output or standard error fails. The first one that the
system refuses is reported on the other stream, and the run goes on:

  jaxgpt train … | head        the pipe is closed
  jaxgpt train … | tee log     Ctrl-C ends `tee` too, before the run has saved
  jaxgpt train … > log         the disk is full; later lines are tried again
  a closed terminal            see also `stop_signal`
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO, cast

from jaxgpt.errors import first_line, printable

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # no later write will succeed
_CLOSED = "it is closed"


class _Lasting:
  """A text stream whose writes do not fail. Everything else is the stream's own.

  Attributes:
    problem: The reason of the last write, if it failed, or None.
  """

  def __init__(self, stream: TextIO, name: str):
    self.stream, self.name = stream, name
    self.problem: str | None = None
    self.reported = False

  def write(self, text: str) -> int:
    self._try(lambda: self.stream.write(text))
    return len(text)

  def flush(self) -> None:
    self._try(self.stream.flush)

  def _try(self, call: Any) -> None:
    try:
      call()
      self.problem = _CLOSED if self.problem == _CLOSED else None
    except (OSError, ValueError) as e:  # a ValueError: the stream is closed
      self.problem = getattr(e, "strerror", None) or first_line(e)
      if isinstance(e, ValueError) or e.errno in _GONE:
        self.problem = _CLOSED
        discard(self.stream)
      _report(self)

  def __getattr__(self, name: str) -> Any:
    return getattr(self.stream, name)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
  """Standard output and standard error do not fail within this context. Contexts may be nested."""
  if isinstance(sys.stdout, _Lasting):
    yield
    return
  out, err = sys.stdout, sys.stderr
  mine = [
    _Lasting(stream or io.StringIO(), name)  # None: the program was started without it
    for stream, name in ((out, "standard output"), (err, "standard error"))
  ]
  sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in mine)
  try:
    yield
  finally:
    for stream in mine:
      stream.flush()
      if stream.problem:  # or the interpreter would fail at exit, in its own last flush
        discard(stream.stream)
    sys.stdout, sys.stderr = out, err


def discard(stream: TextIO) -> None:
  """Sends what is written to a stream from now on, and what it holds, nowhere."""
  with contextlib.suppress(OSError, ValueError):
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
    stream.flush()


def tell(lines: Sequence[str]) -> None:
  """Prints lines on standard output, and on standard error if that fails."""
  if not lines:
    return
  print("\n".join(lines), flush=True)
  if isinstance(sys.stdout, _Lasting) and sys.stdout.problem:
    print("\n".join(lines), file=sys.stderr, flush=True)


def warn(message: str) -> None:
  """Prints one line that a user must see: on standard error, or else on standard output."""
  line = f"jaxgpt: warning: {printable(message)}"
  print(line, file=sys.stderr, flush=True)
  if isinstance(sys.stderr, _Lasting) and sys.stderr.problem:
    print(line, flush=True)


def _report(failed: _Lasting) -> None:
  """Says once, on the other stream, that a stream has failed."""
  if failed.reported:
    return
  failed.reported = True
  other = sys.stderr if failed.name == "standard output" else sys.stdout
  if isinstance(other, _Lasting) and not other.problem:
    other.write(
      f"jaxgpt: warning: {failed.name} can't be written ({failed.problem}); the run goes on, and "
      "its metrics are in metrics.jsonl\n"
    )
    other.flush()
