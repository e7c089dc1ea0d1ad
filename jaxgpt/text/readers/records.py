"""Types and helpers that the readers of all formats share: records, faults, bounded lines."""

from collections.abc import Collection, Iterator
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from jaxgpt.storage import files, streams


class Record(NamedTuple):
  """One record of a file.

  Attributes:
    where: Its place, 'file:line' or 'file:number'.
    values: {column: value}, or the text itself in a format without columns.
    id: The record's own identifier, or ''.
    html: The text is an HTML page.
  """

  where: str
  values: dict[str, Any] | str
  id: str = ""
  html: bool = False


class Fault(NamedTuple):
  """Records that can't be read.

  Attributes:
    rule: Name of the rule that they break. See `documents.ERRORS`.
    where: Place of the first.
    why: Reason, for the report.
    count: Number of records.
  """

  rule: str
  where: str
  why: str
  count: int = 1  # type: ignore[assignment]  # hides tuple.count, which nobody needs


class Note(NamedTuple):
  """A remark about a file, for the report. It counts no document.

  Attributes:
    what: The remark, about any number of files: 'JSON files without a table, read as text'.
    where: The file.
  """

  what: str
  where: str


Item: TypeAlias = Record | Fault | Note


class TooLong(Exception):
  """A record is longer than `Want.max_bytes`."""


class Want(NamedTuple):
  """A request to a reader.

  Attributes:
    columns: Names of the columns to read. A reader may return others too.
    required: The columns among them that every document needs.
    max_bytes: Longer records are faults.
    encoding: Encoding of files of text without a byte order mark, if it is not UTF-8.
    delimiter: Character between the fields of a row, if it is not a comma.
  """

  columns: tuple[str, ...]
  required: tuple[str, ...]
  max_bytes: int
  encoding: str | None = None
  delimiter: str | None = None


def lines(file: files.File, stream: BinaryIO, want: Want) -> Iterator[tuple[int, bytes | None]]:
  """Yields (line number, line) for each line of a file. The line is None if it is too long."""
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


def too_long(where: str, want: Want) -> Fault:
  """The fault of a record above the size limit."""
  return Fault("too long", where, f"more than {want.max_bytes:,} bytes")


def decoded(
  where: str, data: bytes, encoding: str = "utf-8", html: bool = False, way_out: str = ""
) -> Item:
  """Decodes a text: a record, or a fault if the bytes are not text in this encoding.

  Args:
    where: Place of the text.
    data: Its bytes.
    encoding: 'utf-8', or 'utf-8-sig' to skip a byte order mark.
    html: The text is an HTML page.
    way_out: End of the fault's reason.
  """
  way_out = way_out and f"; {way_out}"
  if (zero := data.find(b"\0")) >= 0:
    return Fault("binary", where, f"byte {zero} is 0, so this is not UTF-8 text{way_out}")
  try:
    return Record(where, data.decode(encoding), html=html)
  except UnicodeDecodeError as e:
    return Fault("invalid utf-8", where, f"{e.reason} at byte {e.start}{way_out}")


def from_object(where: str, value: Any) -> Item:
  """A JSON value as a record, or a fault if it is not an object."""
  if isinstance(value, dict):
    return Record(where, value)
  return Fault("missing field", where, f"a JSON object is needed, not a {type(value).__name__}")


def top_column(column: str, names: Collection[str]) -> str:
  """The top-level column of a path: 'meta' for 'meta.url', unless a column 'meta.url' exists."""
  return column if column in names else column.partition(".")[0]
