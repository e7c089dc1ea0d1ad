"""Text in other encodings than UTF-8: told by a byte order mark, or named by the user.

Readers see UTF-8 only. Bytes that the encoding does not allow become bytes that UTF-8 does not
allow either, so they are reported and counted with the record that holds them, as in any file.
"""

import codecs
import io
from typing import Any, BinaryIO

from jaxgpt.errors import UserError, nearest
from jaxgpt.storage import files, streams
from jaxgpt.text.readers import records

# The longer marks first: UTF-32 (little endian) begins like UTF-16.
_MARKS = (
  (codecs.BOM_UTF32_LE, "utf-32"),
  (codecs.BOM_UTF32_BE, "utf-32"),
  (codecs.BOM_UTF16_LE, "utf-16"),
  (codecs.BOM_UTF16_BE, "utf-16"),
)
_COMMON: tuple[str, ...] = ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1252")
_COMMON += ("cp1251", "koi8-r", "gb18030", "big5", "shift_jis", "euc-jp", "euc-kr", "iso8859-2")
_BAD = "jaxgpt_bad"  # name of the error handler


def _mark_bad(error: UnicodeError) -> tuple[str, int]:
  """Replaces bytes that can't be decoded with a lone surrogate."""
  assert isinstance(error, UnicodeDecodeError)
  return "\udcff", error.end


codecs.register_error(_BAD, _mark_bad)


def check(name: str) -> str:
  """The canonical name of an encoding, such as 'iso8859-1' for 'latin1'.

  Raises:
    UserError: There is no such encoding of text.
  """
  try:
    "".encode(name)  # fails for codecs that do not encode text, such as base64
    return codecs.lookup(name).name
  except (LookupError, UnicodeError, ValueError) as e:
    raise UserError(
      f"encoding={name!r}: {nearest(name.lower(), _COMMON)}no such encoding of text; name one that "
      f"Python knows, such as {', '.join(_COMMON[1:6])}"
    ) from e


def of_mark(head: bytes) -> str | None:
  """The encoding that a file's first four bytes tell, other than UTF-8, or None."""
  return next((name for mark, name in _MARKS if head.startswith(mark)), None)


def is_utf8(file: files.File) -> bool:
  """Whether no byte order mark tells another encoding than UTF-8."""
  with streams.open_random(file) as stream:
    return of_mark(stream.peek(4)[:4]) is None


def open_text(file: files.File, want: records.Want) -> io.BufferedReader:
  """Opens a file of text as UTF-8. See `streams.open_stream`.

  A byte order mark decides, then `want.encoding`, then UTF-8 is assumed. A file in UTF-8 is not
  changed, nor checked, and keeps its mark.
  """
  stream = streams.open_stream(file)
  try:
    head = stream.peek(4)[:4] if not file.start else b""
    encoding = of_mark(head) or (None if head.startswith(codecs.BOM_UTF8) else want.encoding)
    if encoding in (None, "utf-8"):
      return stream
    return io.BufferedReader(_Recoded(stream, encoding), streams.BUFFER)
  except BaseException:
    stream.close()
    raise


def hint(data: bytes, want: records.Want) -> str:
  """The way out for bytes that are not UTF-8, or not in the encoding that was named."""
  if want.encoding:
    return f"this is not --encoding={want.encoding}"
  for start, name in ((1, "utf-16-le"), (0, "utf-16-be")):
    half = data[:200][start::2]
    if len(half) > 1 and half.count(0) > 0.8 * len(half):
      return f"this may be UTF-16: name it with --encoding={name}"
  return "name another encoding than UTF-8 with --encoding, such as latin-1"


class _Recoded(io.RawIOBase):
  """A stream of text in some encoding, as UTF-8 without a byte order mark."""

  def __init__(self, raw: BinaryIO, encoding: str):
    self._raw, self._decode = raw, codecs.getincrementaldecoder(encoding)(_BAD).decode
    self._output, self._is_start, self._ended = memoryview(b""), True, False

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._output and not self._ended:
      data = self._raw.read1(streams.BUFFER)  # type: ignore[attr-defined]
      self._ended = not data
      text = self._decode(data, self._ended)
      if text and self._is_start:
        text, self._is_start = text.removeprefix("\ufeff"), False
      self._output = memoryview(text.encode("utf-8", "surrogatepass"))
    size = min(len(buffer), len(self._output))
    buffer[:size], self._output = self._output[:size], self._output[size:]
    return size

  def close(self) -> None:
    self._raw.close()
    super().close()
