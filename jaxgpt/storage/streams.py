"""Byte streams of local and remote files: decompressed, retried, with one kind of error.

A stream is built in layers. Each hides one difference from the layers above it:

  BufferedReader   small reads
  _Guarded         turns every error into an OSError, after all bytes before it were delivered
  GzipFile, ...    decompression, chosen by the first bytes
  BufferedReader, _Guarded
  _Remote          fsspec with retries; or an open local file
"""

import bz2
import gzip
import io
import lzma
import os
import time
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from jaxgpt.errors import optional
from jaxgpt.storage import files

BUFFER = 1 << 20  # bytes read from a file at a time
_REMOTE_BLOCK = 8 << 20  # bytes per request to a remote file
_WAITS = (1, 4, 15)  # seconds before each retry of a remote read
# Compressed bytes given to the Zstandard decompressor at a time. Small inputs bound the size that
# they can decompress to.
_ZSTD_INPUT = (512, 4096)


def open_stream(file: files.File) -> io.BufferedReader:
  """Opens a file for reading from front to back, decompressed.

  gzip, bzip2, xz and Zstandard are recognized by their first bytes, whatever the name says, because
  a server may have decompressed a `.gz` on the way.

  Raises:
    OSError: On opening, or on reading damaged, truncated or unreachable data. All bytes before the
      damage are delivered first.
    UserError: An extra is not installed.
  """
  stream = _open(file, in_order=True)
  try:
    if file.end is not None:
      stream.seek(file.start)
      return stream
    if opener := _decompressor(stream):
      return io.BufferedReader(_Guarded(opener(stream), stream), BUFFER)
  except BaseException:
    stream.close()
    raise
  return stream


def is_plain(file: files.File) -> bool:
  """Whether a file is local and not compressed, so that ranges of it can be read."""
  if files.scheme_of(file.address):
    return False
  with _open(file, in_order=False) as stream:
    return stream.seekable() and _decompressor(stream) is None


def _decompressor(stream: io.BufferedReader) -> Callable[[Any], Any] | None:
  """The function that opens a compressed stream, or None."""
  head = stream.peek(16)[:16]
  return next((opener for matches, opener in _COMPRESSIONS if matches(head)), None)


def open_random(file: files.File) -> io.BufferedReader:
  """Opens a file's stored bytes, for reading in any order if the server supports it.

  Raises:
    OSError: On opening or reading.
  """
  return _open(file, in_order=False)


def _open(file: files.File, in_order: bool) -> io.BufferedReader:
  if not files.scheme_of(file.address):
    try:
      return cast(io.BufferedReader, open(file.address, "rb", buffering=BUFFER))
    except IsADirectoryError as e:
      raise OSError("the folder can't be listed") from e
  filesystem, path = files.filesystem_of(file.address)
  try:
    raw = _Remote(filesystem, path, in_order and file.address.startswith("http"))
  except OSError:
    raise
  except Exception as e:  # each service has exceptions of its own
    raise OSError(f"{type(e).__name__}: {e}") from e
  return io.BufferedReader(_Guarded(raw), BUFFER)


class _Remote:
  """A remote file that is read block by block, with retries.

  Some web servers cannot send parts of a file. Their files are read in one go, if `may_stream`
  says that the reader reads in order.
  """

  def __init__(self, filesystem: Any, path: str, may_stream: bool):
    self._open = lambda size: filesystem.open(path, "rb", block_size=size)
    self._may_stream, self._streams = may_stream, False
    self._raw = self._open(_REMOTE_BLOCK)
    self.seekable, self.seek = self._raw.seekable, self._raw.seek

  def tell(self) -> int:
    return self._raw.tell()

  def read(self, size: int) -> bytes:
    at = self._raw.tell()
    for wait in (*_WAITS, None):
      try:
        if self._raw is None:
          self._stream_from(at)
        return self._raw.read(size)
      except (FileNotFoundError, PermissionError):
        raise
      except ValueError:  # fsspec reports a server that cannot send parts this way
        if not self._may_stream or self._streams:
          raise
        self._streams = True
      except Exception:
        if wait is None:
          raise
        time.sleep(wait)
      if self._streams:
        self._raw = None
    raise OSError("the connection broke too often")

  def _stream_from(self, position: int) -> None:
    """Opens the file as one response and skips to a position."""
    raw = self._open(0)
    while position and (data := raw.read(min(position, BUFFER))):
      position -= len(data)
    self._raw = raw

  def close(self) -> None:
    if self._raw is not None:
      self._raw.close()


class _Guarded(io.RawIOBase):
  """A stream whose every error is an OSError, raised after all bytes before it were delivered."""

  def __init__(self, raw: Any, below: BinaryIO | None = None):
    """Wraps a stream.

    Args:
      raw: The stream to read.
      below: A stream to close as well.
    """
    self._raw, self._below = raw, below
    self._read = getattr(raw, "read1", raw.read)  # `read` may lose the bytes before an error

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    try:
      data = self._read(len(buffer))
    except OSError:
      raise
    except Exception as e:  # zlib, lzma, zstandard, aiohttp, botocore, ... have their own
      raise OSError(str(e) or type(e).__name__) from e
    buffer[: len(data)] = data
    return len(data)

  def seekable(self) -> bool:
    return self._raw.seekable()

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    return self._raw.seek(offset, whence)

  def tell(self) -> int:
    return self._raw.tell()

  def close(self) -> None:
    if not self.closed:
      self._raw.close()
      if self._below is not None:
        self._below.close()
    super().close()


class _Zstandard(io.RawIOBase):
  """Zstandard frames, decompressed. Unlike zstandard's own stream it reports a truncated file."""

  def __init__(self, raw: BinaryIO, new_frame: Callable[[], Any]):
    """Wraps a compressed stream.

    Args:
      raw: The compressed stream.
      new_frame: Makes a decompressor for one frame.
    """
    self._raw, self._new_frame = raw, new_frame
    self._frame: Any = None  # the decompressor of the current frame
    self._size = _ZSTD_INPUT[0]
    self._input, self._output = b"", memoryview(b"")

  def readable(self) -> bool:
    return True

  def read(self, size: int = -1) -> memoryview | bytes:
    while not self._output:
      data = self._input or self._raw.read(self._size)
      self._input = b""
      if not data:
        if self._frame is not None:
          raise EOFError("Compressed file ended before the end of its last frame")
        return b""
      if self._frame is None:
        self._frame = self._new_frame()
      self._output = memoryview(self._frame.decompress(data))
      # Feed little while the data expands a lot, so that memory stays bounded.
      expands = len(self._output) > BUFFER
      self._size = _ZSTD_INPUT[0] if expands else min(2 * self._size, _ZSTD_INPUT[1])
      if self._frame.eof:
        self._input, self._frame = self._frame.unused_data, None
    out, self._output = self._output[:size], self._output[size:]
    return out


def _open_zstandard(stream: BinaryIO) -> _Zstandard:
  zstandard = optional("zstandard", "data", "reading Zstandard-compressed files")
  decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as `zstd --long=31` writes
  return _Zstandard(stream, decompressor.decompressobj)


# (test of the first bytes, opener). The tests look at enough bytes to tell text from compression.
_COMPRESSIONS: tuple[tuple[Callable[[bytes], bool], Callable[[Any], Any]], ...] = (
  (lambda head: head.startswith(b"\x1f\x8b\x08"), lambda stream: gzip.GzipFile(fileobj=stream)),
  (lambda head: head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"), bz2.BZ2File),
  (lambda head: head.startswith(b"\xfd7zXZ\0"), lzma.LZMAFile),
  (
    lambda head: (
      head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] < 0x60)
    ),
    _open_zstandard,
  ),
)
