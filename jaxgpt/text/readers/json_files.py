"""Readers of JSON: one object per line, or one array of objects."""

import codecs
import itertools
import json
import re
from collections.abc import Iterator

from jaxgpt.storage import files, streams
from jaxgpt.text.readers import records, text_files

_BEFORE_ELEMENTS = re.compile(r"\s*\[\s*(\])?")
_AFTER_ELEMENT = re.compile(r"\s*(?:,\s*|(\]))")


def read_lines(file: files.File, want: records.Want) -> Iterator[records.Item]:
  """Reads JSON Lines: a JSON object per line. Blank lines are skipped."""
  with streams.open_stream(file) as stream:
    for number, line in records.lines(file, stream, want):
      where = f"{file.source}:{number}"
      if line is None:
        yield records.too_long(where, want)
      elif line.strip():
        yield _record(where, line, "utf-8-sig" if number == 1 else "utf-8")


def _record(where: str, line: bytes, encoding: str) -> records.Item:
  """A line as a record, or the fault in it."""
  try:
    value = json.loads(line.decode(encoding))
  except UnicodeDecodeError as e:
    return records.Fault("invalid utf-8", where, f"{e.reason} at byte {e.start}")
  except (ValueError, RecursionError) as e:
    return records.Fault("invalid json", where, str(e))
  return records.from_object(where, value)


def read(file: files.File, want: records.Want) -> Iterator[records.Item]:
  """Reads a .json file, which may be a table or a text.

  It is a table (JSON Lines or an array of objects) if its first object has a required column, and
  a text (such as a configuration file) otherwise.
  """
  head = _head(file).removeprefix(codecs.BOM_UTF8).lstrip()
  is_array = head.startswith(b"[")
  try:
    text = head.removeprefix(b"[").decode("utf-8", "replace").lstrip()
    value, end = json.JSONDecoder().raw_decode(text)
    is_table = (
      isinstance(value, dict)
      and not set(want.required).isdisjoint(value)
      and (is_array or "\n" not in text[:end])
    )
  except (ValueError, RecursionError):
    is_table = False
  if not is_table:
    return text_files.read(file, want)
  return _read_array(file, want) if is_array else read_lines(file, want)


def _head(file: files.File) -> bytes:
  """The first `BUFFER` bytes of a file, or fewer if it is shorter or can't be read."""
  head = b""
  try:
    with streams.open_stream(file) as stream:
      while len(head) < streams.BUFFER and (data := stream.read1(streams.BUFFER - len(head))):
        head += data
  except OSError:  # the reader meets it again and reports it
    pass
  return head


def _read_array(file: files.File, want: records.Want) -> Iterator[records.Item]:
  """Reads the elements of one JSON array.

  A broken element ends the file: unlike JSON Lines, nothing marks the start of the next one.
  """
  # `text[at:]` is the part of the file that is not parsed yet. An element is parsed again, with
  # twice the text, until it ends before the buffer does.
  decoder, decode = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
  with streams.open_stream(file) as stream:
    text, at, ended = "", 0, False
    for number in itertools.count(1):
      where = f"{file.source}:{number}"
      separator = _AFTER_ELEMENT if number > 1 else _BEFORE_ELEMENTS
      while True:
        try:
          found = separator.match(text, at)
          if found and found[1]:
            return
          value, end = decoder.raw_decode(text, found.end()) if found else (None, len(text))
          if found and (end < len(text) or ended):
            break
          why = "neither a comma nor the end of the array"
        except (ValueError, RecursionError) as e:
          why = str(e)
        if ended:
          yield records.Fault("invalid json", where, f"{why}; the rest of the file is left out")
          return
        if len(text) - at > want.max_bytes:
          yield records.too_long(where, want)
          return
        data = stream.read1(max(streams.BUFFER, len(text)))
        text, at, ended = text[at:] + decode.decode(data), 0, not data
      at = end
      yield records.from_object(where, value)
