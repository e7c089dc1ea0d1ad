"""Reader of plain text files."""

import itertools
from collections.abc import Iterator
from typing import BinaryIO

from jaxgpt.storage import files, streams
from jaxgpt.text.readers import encodings, records

_HTML = (".html", ".htm", ".xhtml")


def read(file: files.File, want: records.Want) -> Iterator[records.Item]:
  """Reads a text file as one document, or as several if it is longer than `want.max_bytes`.

  A long file is cut after lines. A byte order mark is not part of the text.
  """
  html = files.suffix(file.address) in _HTML
  with encodings.open_text(file, want) as stream:
    # Read one byte more than a document may have: if it is there, the file goes on. The document
    # then ends after its last whole line, and the rest of the buffer begins the next one.
    line, left = 1, b""
    for number in itertools.count():
      data = _read_up_to(stream, want.max_bytes + 1, left)
      more = len(data) > want.max_bytes
      end = (
        data.rfind(b"\n", 0, want.max_bytes) + 1 or _whole_characters(data, want.max_bytes)
        if more
        else len(data)
      )
      data, left = data[:end], data[end:]
      where = f"{file.source}:{line}" if more or number else file.source
      form = "utf-8" if number else "utf-8-sig"
      yield records.decoded(where, data, form, html, encodings.hint(data, want))
      line += data.count(b"\n")
      if not more:
        return


def _read_up_to(stream: BinaryIO, size: int, data: bytes = b"") -> bytes:
  """Extends `data` to `size` bytes from a stream, or to the end of the stream."""
  pieces, length = [data], len(data)
  while length < size and (piece := stream.read(min(streams.BUFFER, size - length))):
    pieces.append(piece)
    length += len(piece)
  return b"".join(pieces)


def _whole_characters(data: bytes, end: int) -> int:
  """The last end of a UTF-8 character at or before `end`."""
  while end > 1 and data[end] & 0xC0 == 0x80:
    end -= 1
  return end
