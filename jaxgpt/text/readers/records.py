"""What readers of all formats share: records, faults, lines of bounded length."""

from typing import NamedTuple

from jaxgpt.storage import streams


class Record(NamedTuple):
  """One record and the name of its place, 'file:line' or 'file:number'.

  `values` is a dict of columns, or the text itself where the format has no columns.
  """

  where: str
  values: dict | str
  id: str = ""
  html: bool = False


class Fault(NamedTuple):
  """What could not be read: a rule's name, a place, a reason, and how many records it is."""

  rule: str
  where: str
  why: str
  count: int = 1


class Want(NamedTuple):
  """What a reader is asked for."""

  columns: tuple  # names of columns; those a format can leave out cheaply are left out
  required: tuple  # those without which there is no document
  max_bytes: int  # longer records are faults


def lines(file, stream, want):
  """(line number, line as bytes, or None for one that is too long) for each line of a file."""
  number, left = file.line, None if file.end is None else file.end - file.start
  while left is None or left > 0:
    line = stream.readline(want.max_bytes + 1)
    if not line:
      return
    length, whole = len(line), line.endswith(b"\n") or len(line) <= want.max_bytes
    while not line.endswith(b"\n") and (rest := stream.readline(streams.BUFFER)):
      length, line = length + len(rest), rest
    if left is not None:
      left -= length
    yield number, line if whole else None
    number += 1


def too_long(where, want):
  return Fault("too long", where, f"more than {want.max_bytes:,} bytes")


def decoded(where, data, encoding="utf-8", html=False):
  """A text that is UTF-8, as a record, or the fault that it is none."""
  if (zero := data.find(b"\0")) >= 0:
    return Fault("binary", where, f"byte {zero} is 0, so it is no UTF-8 text")
  try:
    return Record(where, data.decode(encoding), html=html)
  except UnicodeDecodeError as e:
    return Fault(
      "invalid utf-8", where, f"{e.reason} at byte {e.start}; other encodings must be converted"
    )


def from_object(where, value):
  """A JSON value as a record, or the fault that it has no columns."""
  if isinstance(value, dict):
    return Record(where, value)
  return Fault("missing field", where, f"a JSON object is needed, not a {type(value).__name__}")


def top_column(column, names):
  """The column that holds another: 'meta' for 'meta.url', where there is no 'meta.url' itself."""
  return column if column in names else column.partition(".")[0]
