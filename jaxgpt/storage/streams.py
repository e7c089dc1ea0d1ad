"""A file to a stream of bytes: local or remote, decompressed, and with one kind of error."""

import bz2
import gzip
import io
import lzma
import os
import time

from jaxgpt.errors import optional
from jaxgpt.storage import files

BUFFER = 1 << 20  # bytes asked of a file at a time
_REMOTE_BLOCK = 8 << 20  # bytes a request, of a remote file
_WAITS = (1, 4, 15)  # seconds before a remote read is tried again
_ZSTD_INPUT = (512, 4096)  # compressed bytes given at a time: bounds what they can grow to


def open_stream(file):
  """A file's bytes, decompressed: a buffered binary stream that is read from front to back.

  gzip, bzip2, xz and Zstandard are told by their first bytes, whatever the name says: a server may
  well have decompressed a `.gz` on the way.

  Raises:
    OSError: on opening, or on reading what is damaged, cut short or out of reach. What came before
      has been handed out.
    UserError: a missing extra.
  """
  stream = _open(file, True)
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


def is_plain(file):
  """Whether a file is local and not compressed, so that it can be read from anywhere in it."""
  if files.scheme_of(file.address):
    return False
  with _open(file, False) as stream:
    return stream.seekable() and _decompressor(stream) is None


def _decompressor(stream):
  """What opens a compressed stream, or None."""
  head = stream.peek(16)[:16]
  return next((opener for is_it, opener in _COMPRESSIONS if is_it(head)), None)


def open_random(file):
  """A file's bytes as they are stored; where the server can, they are read in any order.

  Raises:
    OSError: on opening or reading.
  """
  return _open(file, False)


def _open(file, in_order):
  if not files.scheme_of(file.address):
    return open(file.address, "rb", buffering=BUFFER)
  filesystem, path = files.filesystem_of(file.address)
  try:
    raw = _Remote(filesystem, path, in_order and file.address.startswith("http"))
  except OSError:
    raise
  except Exception as e:  # each service has exceptions of its own
    raise OSError(f"{type(e).__name__}: {e}") from e
  return io.BufferedReader(_Guarded(raw), BUFFER)


class _Remote:
  """A remote file, block by block; what fails is tried again a few times.

  A web server that sends files only whole is read in one go, if that is allowed.
  """

  def __init__(self, filesystem, path, may_stream):
    self._open = lambda size: filesystem.open(path, "rb", block_size=size)
    self._may_stream, self._streams = may_stream, False
    self._raw = self._open(_REMOTE_BLOCK)
    self.seekable, self.seek = self._raw.seekable, self._raw.seek

  def tell(self):
    return self._raw.tell()

  def read(self, size):
    at = self._raw.tell()
    for wait in (*_WAITS, None):
      try:
        if self._raw is None:
          self._stream_from(at)
        return self._raw.read(size)
      except (FileNotFoundError, PermissionError):
        raise
      except ValueError:  # fsspec's way to say that the server doesn't send parts
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

  def _stream_from(self, position):
    raw = self._open(0)
    while position and (data := raw.read(min(position, BUFFER))):
      position -= len(data)
    self._raw = raw

  def close(self):
    if self._raw is not None:
      self._raw.close()


class _Guarded(io.RawIOBase):
  """A stream whose every failure is an OSError, and that hands out all that came before it."""

  def __init__(self, raw, below=None):
    self._raw, self._below = raw, below
    self._read = getattr(raw, "read1", raw.read)  # `read` may lose what came before an error

  def readable(self):
    return True

  def readinto(self, buffer):
    try:
      data = self._read(len(buffer))
    except OSError:
      raise
    except Exception as e:  # zlib, lzma, zstandard, aiohttp, botocore … have their own
      raise OSError(str(e) or type(e).__name__) from e
    buffer[: len(data)] = data
    return len(data)

  def seekable(self):
    return self._raw.seekable()

  def seek(self, offset, whence=os.SEEK_SET):
    return self._raw.seek(offset, whence)

  def tell(self):
    return self._raw.tell()

  def close(self):
    if not self.closed:
      self._raw.close()
      if self._below is not None:
        self._below.close()
    super().close()


class _Zstandard(io.RawIOBase):
  """Zstandard frames, decompressed. Unlike zstandard's own stream it tells a file cut short."""

  def __init__(self, raw, new):
    self._raw, self._new = raw, new
    self._frame, self._size = None, _ZSTD_INPUT[0]
    self._input, self._output = b"", memoryview(b"")

  def readable(self):
    return True

  def read(self, size):
    while not self._output:
      data = self._input or self._raw.read(self._size)
      self._input = b""
      if not data:
        if self._frame is not None:
          raise EOFError("Compressed file ended before the end of its last frame")
        return b""
      if self._frame is None:
        self._frame = self._new()
      self._output = memoryview(self._frame.decompress(data))
      grows = len(self._output) > BUFFER
      self._size = _ZSTD_INPUT[0] if grows else min(2 * self._size, _ZSTD_INPUT[1])
      if self._frame.eof:
        self._input, self._frame = self._frame.unused_data, None
    out, self._output = self._output[:size], self._output[size:]
    return out


def _open_zstandard(stream):
  zstandard = optional("zstandard", "data", "reading Zstandard-compressed files")
  decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as of `zstd --long=31`
  return _Zstandard(stream, decompressor.decompressobj)


_COMPRESSIONS = (  # (whether the first bytes tell it, opener)
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
