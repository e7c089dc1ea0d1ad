"""Readers of tables: comma- and tab-separated values, Parquet."""

import collections
import csv
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxgpt.errors import first_line, optional
from jaxgpt.storage import files, streams
from jaxgpt.text.readers import encodings, records

_PARQUET_ROWS = 256  # rows decoded at a time
_QUOTED_LINES = 20  # lines after the first of a quoted field, from which on it is suspected
_CHECKED_LINES = 1000  # of a suspected field


class _TextLines:
  """The lines of a file as strings. It may be iterated further after raising `records.TooLong`.

  Bytes that are not UTF-8 become lone surrogates. The check of each document reports them.

  Attributes:
    number: Number of the last line handed out.
    row: The lines handed out since `start_row`. None: a line that is too long.
  """

  def __init__(self, lines: Iterator[tuple[int, bytes | None]], max_chars: int):
    self._lines, self._max_chars = lines, max_chars
    self._again: collections.deque[str | None] = collections.deque()
    self._chars = self.number = 0
    self.row: list[str | None] = []

  def start_row(self) -> None:
    """Forgets the lines of the row before."""
    self.row, self._chars = [], 0

  def read_again(self) -> None:
    """Hands out the lines of the row once more, except the first."""
    self._again.extendleft(reversed(self.row[1:]))
    self.number -= len(self.row) - 1

  def __iter__(self) -> Iterator[str]:
    return self

  def __next__(self) -> str:
    text: str | None
    if self._again:
      text = self._again.popleft()
      self.number += 1
    else:
      self.number, line = next(self._lines)
      code = "utf-8-sig" if self.number == 1 else "utf-8"
      text = None if line is None else line.decode(code, "surrogateescape")
    self.row.append(text)
    self._chars += len(text or "")
    if text is None or (self._chars > self._max_chars and len(self.row) > 1):
      raise records.TooLong
    return text


def read_csv(file: files.File, want: records.Want) -> Iterator[records.Item]:
  """Reads comma-separated values. The first row names the columns. Quotes may enclose newlines.

  A quote that is opened and not closed would take the rows after it for text. If these lines are
  rows when each is read alone, only the row with the quote is dropped.
  """
  return _read_rows(file, want, strict=True, delimiter=want.delimiter or ",")


def read_tsv(file: files.File, want: records.Want) -> Iterator[records.Item]:
  """Reads tab-separated values. The first row names the columns. Quotes have no meaning."""
  return _read_rows(file, want, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_rows(file: files.File, want: records.Want, **dialect: Any) -> Iterator[records.Item]:
  csv.field_size_limit(want.max_bytes)
  with encodings.open_text(file, want) as stream:
    lines = _TextLines(records.lines(file, stream, want), want.max_bytes)
    rows, header = csv.reader(lines, **dialect), list[str]()
    while True:
      where = f"{file.source}:{lines.number + 1}"
      lines.start_row()
      row, fault, least = _next_row(rows, where, header, want)
      if row is None:
        return
      extent = f" (lines {where.rpartition(':')[2]} to {lines.number})" * (len(lines.row) > 1)
      if not header:
        header = row
        if fault := fault or _check_header(where, row, lines.row[0] or "", want):
          yield fault._replace(why=fault.why + extent)
          return
      elif len(lines.row) > 1 and _are_rows(lines.row[1:], len(header), least, dialect):
        why = (
          f"a quote is opened in this row and not closed; the {len(lines.row) - 1:,} lines after "
          "it are read as rows"
        )
        yield records.Fault("invalid csv", where, why)
        lines.read_again()
      elif fault:
        yield fault._replace(why=fault.why + extent)
      elif any("\0" in value for value in row):
        yield records.Fault("binary", where, "a field holds a byte 0")
      elif row:
        yield records.Record(where, dict(zip(header, row)))


def _next_row(
  rows: Iterator[list[str]], where: str, header: Sequence[str], want: records.Want
) -> tuple[list[str] | None, records.Fault | None, int]:
  """The next row.

  Returns:
    The fields, or None at the end of the file. The row's fault, or None. Lines that the row must
    have after its first to be suspected of an open quote.
  """
  try:
    row = next(rows)
  except StopIteration:
    return None, None, 0
  except records.TooLong:
    return [], records.too_long(where, want), _QUOTED_LINES
  except csv.Error as e:
    if "limit" in str(e):
      return [], records.Fault("too long", where, str(e)), _QUOTED_LINES
    return [], records.Fault("invalid csv", where, str(e)), 1
  if header and row and len(row) != len(header):
    why = f"{len(row)} fields, the first row has {len(header)}"
    return row, records.Fault("invalid csv", where, why), 1
  return row, None, _QUOTED_LINES


def _are_rows(
  lines: Sequence[str | None], columns: int, least: int, dialect: Mapping[str, Any]
) -> bool:
  """Whether lines that a quoted field has taken are rows of their own.

  Args:
    lines: The lines of the row after its first. The last may have a part of another field.
    columns: Columns of the table. With a single one any line is a row, so only many lines that no
      quote closes are taken for rows.
    least: Lines that it takes.
    dialect: Arguments of `csv.reader`.
  """
  if len(lines) < least:
    return False
  if columns == 1:
    return least == 1 and len(lines) > _QUOTED_LINES
  inner = [x for x in (lines[:-1] or lines)[:_CHECKED_LINES] if x and not x.isspace()]
  return bool(inner) and sum(_columns_of(x, dialect) == columns for x in inner) > 0.9 * len(inner)


def _columns_of(line: str, dialect: Mapping[str, Any]) -> int:
  """Fields of a line that is read alone, or 0 if it is no row."""
  try:
    return len(next(csv.reader([line], **dialect)))
  except (csv.Error, StopIteration):
    return 0


def _check_header(
  where: str, names: Sequence[str], line: str, want: records.Want
) -> records.Fault | None:
  """The fault of the first row, or None."""
  fault = _check_columns(where, names, want)
  for other in (";", "\t", "|", ","):
    if fault and not _check_columns(where, line.strip().split(other), want):
      return fault._replace(why=f"{fault.why}; give --delimiter={other!r}")
  return fault


def _check_columns(
  where: str, names: Sequence[str], want: records.Want, count: int = 1
) -> records.Fault | None:
  """The fault of a table that lacks a required column or has a column twice, or None."""
  tops = {records.top_column(column, names) for column in want.columns}
  if missing := [c for c in want.required if records.top_column(c, names) not in names]:
    has = ", ".join(map(repr, names))
    why = f"no column {missing[0]!r} in {has[:100]}"
    return records.Fault("missing field", where, why, count)
  if double := [name for name in names if name in tops and names.count(name) > 1]:
    return records.Fault("missing field", where, f"more than one column {double[0]!r}", count)
  return None


def read_parquet(file: files.File, want: records.Want) -> Iterator[records.Item]:
  """Reads the wanted columns of a Parquet file, a few rows at a time. Skips broken row groups."""
  parquet = optional("pyarrow.parquet", "data", f"reading {file.source}")
  arrow = optional("pyarrow", "data", f"reading {file.source}")
  broken = (OSError, ValueError, TypeError, RuntimeError, LookupError, arrow.ArrowException)
  with streams.open_random(file) as stream:
    try:
      if not stream.seekable():
        raise OSError("the server does not support range requests; download the file first")
      table = parquet.ParquetFile(
        stream, buffer_size=streams.BUFFER, page_checksum_verification=True
      )
      names, rows = table.schema_arrow.names, table.metadata.num_rows
    except broken as e:
      yield records.Fault("unreadable", file.source, first_line(e))
      return
    if fault := _check_columns(file.source, names, want, rows):
      yield fault
      return
    tops = {records.top_column(column, names) for column in want.columns}
    columns, first = [name for name in names if name in tops], 1
    for group in range(table.metadata.num_row_groups):
      rows, done = table.metadata.row_group(group).num_rows, 0
      try:
        for batch in table.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=columns):
          for record in _batch_records(batch, file.source, first + done):
            done += 1
            yield record
      except broken as e:
        where = f"{file.source}:{first + done}"
        yield records.Fault("unreadable", where, first_line(e), rows - done)
      first += rows


def _batch_records(batch: Any, source: str, first: int) -> Iterator[records.Item]:
  """The rows of an Arrow batch. `first` is the number of its first row in the file."""
  try:
    rows = batch.to_pylist()
  except ValueError:  # one bad value, such as invalid UTF-8: convert row by row to find it
    rows = [None] * len(batch)
  for i, values in enumerate(rows):
    try:
      values = batch.slice(i, 1).to_pylist()[0] if values is None else values
      yield records.Record(f"{source}:{first + i}", values)
    except ValueError as e:
      rule = "invalid utf-8" if isinstance(e, UnicodeDecodeError) else "unreadable"
      yield records.Fault(rule, f"{source}:{first + i}", str(e))
