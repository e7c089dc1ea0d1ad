"""Readers of tables: comma- and tab-separated values, Parquet."""

import csv
from collections.abc import Iterator, Sequence
from typing import Any

from jaxgpt.errors import first_line, optional
from jaxgpt.storage import files, streams
from jaxgpt.text.readers import records

_PARQUET_ROWS = 256  # rows decoded at a time


class _LineTooLong(Exception):
  pass


class _TextLines:
  """The lines of a file as strings. It may be iterated further after raising `_LineTooLong`.

  Bytes that are not UTF-8 become lone surrogates. The check of each document reports them.
  """

  def __init__(self, lines: Iterator[tuple[int, bytes | None]]):
    self.lines = lines
    self.number = 0

  def __iter__(self) -> Iterator[str]:
    return self

  def __next__(self) -> str:
    self.number, line = next(self.lines)
    if line is None:
      raise _LineTooLong
    return line.decode("utf-8-sig" if self.number == 1 else "utf-8", "surrogateescape")


def read_csv(file: files.File, want: records.Want) -> Iterator[records.Item]:
  """Reads comma-separated values. The first row names the columns. Quotes may enclose newlines."""
  return _read_rows(file, want, strict=True)


def read_tsv(file: files.File, want: records.Want) -> Iterator[records.Item]:
  """Reads tab-separated values. The first row names the columns. Quotes have no meaning."""
  return _read_rows(file, want, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_rows(file: files.File, want: records.Want, **dialect: Any) -> Iterator[records.Item]:
  csv.field_size_limit(want.max_bytes)
  with streams.open_stream(file) as stream:
    lines = _TextLines(records.lines(file, stream, want))
    rows, header = csv.reader(lines, **dialect), None
    while True:
      where = f"{file.source}:{lines.number + 1}"
      try:
        row = next(rows)
      except StopIteration:
        return
      except _LineTooLong:
        yield records.too_long(where, want)
        continue
      except csv.Error as e:
        yield records.Fault("too long" if "limit" in str(e) else "invalid csv", where, str(e))
        continue
      if header is None:
        header = row
        if fault := _check_columns(where, header, want):
          yield fault
          return
      elif any("\0" in value for value in row):
        yield records.Fault("binary", where, "a field holds a byte 0")
      elif row and len(row) != len(header):
        why = f"{len(row)} fields, the first row has {len(header)}"
        yield records.Fault("invalid csv", where, why)
      elif row:
        yield records.Record(where, dict(zip(header, row)))


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
