"""Readers of tables: comma- and tab-separated values, Parquet."""

import csv

from jaxgpt.errors import optional
from jaxgpt.storage import streams
from jaxgpt.text.readers import records

_PARQUET_ROWS = 256  # rows decoded at a time


class _LineTooLong(Exception):
  pass


class _TextLines:
  """The lines of a file as strings; goes on after it has raised `_LineTooLong`.

  Bytes that are no UTF-8 become lone surrogates, which the check of each text finds.
  """

  def __init__(self, lines):
    self.lines = lines
    self.number = 0

  def __iter__(self):
    return self

  def __next__(self):
    self.number, line = next(self.lines)
    if line is None:
      raise _LineTooLong
    return line.decode("utf-8-sig" if self.number == 1 else "utf-8", "surrogateescape")


def read_csv(file, want):
  """Comma-separated values; the first row names the columns. Quoted fields may hold line ends."""
  return _read_rows(file, want, strict=True)


def read_tsv(file, want):
  """Tab-separated values; the first row names the columns. A quote is a character like others."""
  return _read_rows(file, want, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_rows(file, want, **dialect):
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


def _check_columns(where, names, want, count=1):
  """The fault of a table that lacks a column, or None."""
  tops = {records.top_column(column, names) for column in want.columns}
  if missing := [c for c in want.required if records.top_column(c, names) not in names]:
    has = ", ".join(map(repr, names))
    why = f"no column {missing[0]!r} in {has[:100]}"
    return records.Fault("missing field", where, why, count)
  if double := [name for name in names if name in tops and names.count(name) > 1]:
    return records.Fault("missing field", where, f"more than one column {double[0]!r}", count)
  return None


def read_parquet(file, want):
  """Parquet, a few rows of the wanted columns at a time. A broken row group is left out."""
  parquet = optional("pyarrow.parquet", "data", f"reading {file.source}")
  arrow = optional("pyarrow", "data", f"reading {file.source}")
  broken = (OSError, ValueError, TypeError, RuntimeError, LookupError, arrow.ArrowException)
  with streams.open_random(file) as stream:
    try:
      if not stream.seekable():
        raise OSError("the server does not allow to read a file in parts; download it first")
      table = parquet.ParquetFile(
        stream, buffer_size=streams.BUFFER, page_checksum_verification=True
      )
      names, rows = table.schema_arrow.names, table.metadata.num_rows
    except broken as e:
      yield records.Fault("unreadable", file.source, _first_line(e))
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
        yield records.Fault("unreadable", where, _first_line(e), rows - done)
      first += rows


def _first_line(error):
  return (str(error) or type(error).__name__).partition("\n")[0]


def _batch_records(batch, source, first):
  try:
    rows = batch.to_pylist()
  except ValueError:  # such as a string that is no UTF-8: each row for itself
    rows = [None] * len(batch)
  for i, values in enumerate(rows):
    try:
      values = batch.slice(i, 1).to_pylist()[0] if values is None else values
      yield records.Record(f"{source}:{first + i}", values)
    except ValueError as e:
      rule = "invalid utf-8" if isinstance(e, UnicodeDecodeError) else "unreadable"
      yield records.Fault(rule, f"{source}:{first + i}", str(e))
