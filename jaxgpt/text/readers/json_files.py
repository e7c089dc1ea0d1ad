"""Readers of JSON: a value per line, one array, or an object that holds an array."""

import codecs
import contextlib
import json
import re
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from jaxgpt.storage import files, streams
from jaxgpt.text.readers import encodings, records, text_files

# Keys that usually hold the records of a file: {"version": 2, "data": [{…}, …]}.
_WRAPPERS = {"data", "rows", "records", "examples", "instances", "documents", "items", "entries"}
_WRAPPERS |= {"samples", "conversations", "results", "train", "validation", "dev", "test"}
_SPACE = re.compile(r"[ \t\n\r]*")
_READ_AS_TEXT = "JSON files without records, each read as one text"


def read_lines(file: files.File, want: records.Want) -> Iterator[records.Item]:
  """Reads JSON Lines: a JSON object per line. Blank lines are skipped."""
  with encodings.open_text(file, want) as stream:
    for number, line in records.lines(file, stream, want):
      where = f"{file.source}:{number}"
      if line is None:
        yield records.too_long(where, want)
      elif line.strip():
        yield _record(where, line, "utf-8-sig" if number == 1 else "utf-8", want)


def _record(where: str, line: bytes, encoding: str, want: records.Want) -> records.Item:
  """A line as a record, or the fault in it."""
  try:
    value = json.loads(line.decode(encoding))
  except UnicodeDecodeError as e:
    why = f"{e.reason} at byte {e.start}; {encodings.hint(line, want)}"
    return records.Fault("invalid utf-8", where, why)
  except (ValueError, RecursionError) as e:
    why = f"; {encodings.hint(line, want)}" if b"\0" in line else ""
    return records.Fault("invalid json", where, f"{e}{why}")
  return records.from_object(where, value)


def read(file: files.File, want: records.Want) -> Iterator[records.Item]:
  """Reads a .json file, which may be a table or a text.

  It is a table if it is

      an array of objects or strings      [{"text": …}, …]      ["…", …]
      objects one after the other         {"text": …} {"text": …}, one per line or in any layout
      one object with a wanted column     {"text": …}
      an object with such an array        {"version": 1, "data": [{"text": …}, …]}

  Any other file, such as a configuration, is a text.
  """
  try:
    with encodings.open_text(file, want) as stream:
      form, keys = _form(stream, want)
    if form == "long":
      with encodings.open_text(file, want) as stream:
        form = _Values(file.source, stream, want, ()).form()
  except OSError:  # the reader meets it again and reports it
    form, keys = "text", []
  if form == "lines":
    yield from read_lines(file, want)
  elif form == "text":
    found = 0
    for item in text_files.read(file, want):
      found += isinstance(item, records.Record)
      yield item
    if found:
      yield records.Note(_READ_AS_TEXT, file.source)
  else:
    with encodings.open_text(file, want) as stream:
      yield from _Values(file.source, stream, want, keys).read(form)


def _form(stream: BinaryIO, want: records.Want) -> tuple[str, list[str]]:
  """The form of a file, from its first bytes.

  Returns:
    'lines', 'values', 'array', 'object' or 'text', and keys of an object that hold records, as far
    as they are known. 'long': an object that is longer than the first bytes, or broken.
  """
  head = b""
  with contextlib.suppress(OSError):  # the reader meets it again and reports it
    while len(head) < streams.BUFFER and (data := stream.read1(streams.BUFFER - len(head))):  # type: ignore[attr-defined]
      head += data
  text = head.decode("utf-8-sig", "replace").lstrip()
  if text.startswith("["):
    after = text[1:].lstrip()[:1]
    return ("array" if after in ("{", '"', "]") else "text"), []
  try:
    value, end = json.JSONDecoder().raw_decode(text)
  except (ValueError, RecursionError):  # broken, or longer than the head
    return ("long" if text.startswith("{") else "text"), []
  if not isinstance(value, dict):
    return "text", []
  rest = text[end:].lstrip(" \t\r")
  if _has_column(value, want) or rest.lstrip().startswith("{"):
    is_lines = "\n" not in text[:end] and (not rest or rest.startswith("\n"))
    return ("lines" if is_lines else "values"), []
  keys = [key for key, x in value.items() if _is_wanted(key, x, want)]
  return ("object" if keys else "text"), keys


def _has_column(value: dict[str, Any], want: records.Want) -> bool:
  return any(records.top_column(column, value) in value for column in want.required)


def _is_wanted(key: str, value: Any, want: records.Want) -> bool:
  """Whether the value of a key of the outermost object is a list of records."""
  if not isinstance(value, list) or not value:
    return False
  if isinstance(value[0], dict):
    return key.lower() in _WRAPPERS or any(
      _has_column(element, want) for element in value if isinstance(element, dict)
    )
  return isinstance(value[0], str) and key.lower() in _WRAPPERS


class _Broken(Exception):
  """The file is no JSON from here on."""


class _Values:
  """Reads JSON values from a stream, one at a time.

  `_text[_at:]` is the part of the file that is not parsed yet. A value is parsed again, with twice
  the text, until it ends before the buffer does.
  """

  def __init__(self, source: str, stream: BinaryIO, want: records.Want, keys: Collection[str]):
    """Args: keys: Keys of an object whose arrays certainly hold records."""
    self._source, self._stream, self._want, self._keys = source, stream, want, keys
    self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    self._json = json.JSONDecoder()
    self._text, self._at, self._ended = "", 0, False
    self._hold: int | None = None  # text from here on is kept, to come back to it
    self._number = 1  # of the next record

  def read(self, form: str) -> Iterator[records.Item]:
    """Reads the whole file, which has the form 'values', 'array' or 'object'.

    A broken record ends the file: unlike JSON Lines, nothing marks the start of the next one.
    """
    try:
      if form == "values":
        while self._peek():
          yield self._record(self._value())
      elif form == "array":
        yield from self._array()
      else:
        yield from self._object()
      if self._peek():
        raise _Broken(f"more text after the end of the {form}")
    except _Broken as e:
      where = f"{self._source}:{self._number}"
      yield records.Fault("invalid json", where, f"{e}; the rest of the file is left out")
    except records.TooLong:
      yield records.too_long(f"{self._source}:{self._number}", self._want)

  def form(self) -> str:
    """The form of a file that begins with an object, as of `_form`, from the keys of the object."""
    try:
      self._take("{")
      one_line = "\n" not in self._text
      while True:
        key = self._value()
        if not isinstance(key, str) or not self._take(":"):
          return "text"
        if _has_column({key: None}, self._want):
          return "lines" if one_line else "values"
        if self._peek() == "[" and self._holds_records(key):
          return "object"
        self._value()
        if not self._take(","):
          break
      is_more = self._take("}") and self._peek() == "{"
      return "text" if not is_more else "lines" if one_line else "values"
    except (_Broken, records.TooLong):
      return "text"

  def _fill(self) -> None:
    """Reads more text."""
    if len(self._text) - self._at > self._want.max_bytes:
      raise records.TooLong
    data = self._stream.read1(max(streams.BUFFER, len(self._text)))  # type: ignore[attr-defined]
    start = self._at if self._hold is None else self._hold
    self._text = self._text[start:] + self._decode(data, not data)
    self._at, self._ended = self._at - start, not data
    self._hold = None if self._hold is None else 0

  def _peek(self) -> str:
    """The next character that is not white space, or '' at the end."""
    while True:
      self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
      if self._at < len(self._text) or self._ended:
        return self._text[self._at : self._at + 1]
      self._fill()

  def _take(self, character: str) -> bool:
    """Skips a character if it is the next one."""
    if self._peek() != character:
      return False
    self._at += 1
    return True

  def _value(self) -> Any:
    """The next value."""
    self._peek()
    while True:
      try:
        value, end = self._json.raw_decode(self._text, self._at)
        if end < len(self._text) or self._ended:  # else a number may go on
          self._at = end
          return value
        why = ""
      except (ValueError, RecursionError) as e:
        why = str(e)
      if self._ended:
        raise _Broken(why)
      self._fill()

  def _record(self, value: Any) -> records.Item:
    where = f"{self._source}:{self._number}"
    self._number += 1
    return (
      records.Record(where, value) if isinstance(value, str) else records.from_object(where, value)
    )

  def _array(self) -> Iterator[records.Item]:
    """The elements of an array."""
    self._take("[")
    if self._take("]"):
      return
    while True:
      yield self._record(self._value())
      if self._take("]"):
        return
      if not self._take(","):
        raise _Broken("neither a comma nor the end of the array")

  def _object(self) -> Iterator[records.Item]:
    """The elements of all arrays of records in an object."""
    self._take("{")
    while True:
      key = self._value()
      if not isinstance(key, str) or not self._take(":"):
        raise _Broken("no key of an object")
      if self._peek() == "[" and self._holds_records(key):
        yield from self._array()
      else:
        self._value()
      if self._take("}"):
        return
      if not self._take(","):
        raise _Broken("neither a comma nor the end of the object")

  def _holds_records(self, key: str) -> bool:
    """Whether the array that comes next is a list of records. Skips nothing."""
    if key in self._keys:
      return True
    self._hold = self._at
    self._at += 1
    first = [] if self._peek() in ("]", "") else [self._value()]
    self._at, self._hold = self._hold, None
    return _is_wanted(key, first, self._want)
