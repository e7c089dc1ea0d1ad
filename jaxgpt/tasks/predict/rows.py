"""Rows to predict: those of files in any format of the readers, of standard input, or of Python.

A row has the columns of its kind of data (`readers.kinds.KINDS`). The columns that hold the answer
may be missing. A row that can't be read keeps its place, so that line n of the output is row n of
the input.
"""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.storage import files
from jaxgpt.text.readers import documents, encodings, formats, questions, records
from jaxgpt.text.readers.kinds import KINDS, MAX_BYTES

# kind -> the columns that a model predicts, which rows need not have.
ANSWERS = {
  "classification": ("label",),
  "multi_label": ("labels",),
  "tagging": ("tags",),
  "question_answering": ("answers",),
  "retrieval": ("positive",),
  "seq2seq": ("target",),
}
STDIN = "-"
LINES = "lines"  # format: each line is a text


class Row(NamedTuple):
  """A row.

  Attributes:
    where: Its place, 'reviews.jsonl:7'.
    fields: Its columns by name. Empty if it can't be read.
    id: The data's own identifier, or ''.
    problem: The reason why it can't be read, or ''.
  """

  where: str
  fields: Mapping[str, Any]
  id: str = ""
  problem: str = ""


def of_text(text: str, kind: str) -> dict[str, Any]:
  """The fields of a row that is given as a text alone.

  Raises:
    UserError: A row of this kind is more than one text.
  """
  if kind == "chat":
    return {"messages": [{"role": "user", "content": text}]}
  if kind == "tagging":
    return {"words": text.split()}
  if kind == "question_answering":
    raise UserError(
      'a question needs its passage: give rows with the columns "question" and "context"'
    )
  name = {"seq2seq": "input", "retrieval": "query"}.get(kind, "text")
  return {name: text}


def of_values(values: Sequence[str | Mapping[str, Any]], kind: str) -> list[Row]:
  """Rows from Python.

  Args:
    values: Texts, or {column: value} of each row.
    kind: A key of `KINDS`.
  """
  columns = documents.columns_of(kind, {})
  want = _want(kind, columns, None)
  out = []
  for number, value in enumerate(values, 1):
    fields = of_text(value, kind) if isinstance(value, str) else dict(value)
    out.append(_row(records.Record(f"row {number}", fields), kind, columns, want))
  return out


def read(
  listed: Sequence[files.File],
  kind: str,
  fields: Mapping[str, str] | None = None,
  form: str | None = None,
  encoding: str | None = None,
) -> Iterator[Row]:
  """Reads the rows of files, in bounded memory.

  Args:
    listed: From `documents.find` or `standard_input`.
    kind: A key of `KINDS`.
    fields: {name: column} for columns that are not called like the name.
    form: A key of `formats.FORMATS`, or 'lines'. None: by each file's suffix. Files of text are
      read line by line.
    encoding: Encoding of files of text without a byte order mark. None: UTF-8.

  Raises:
    UserError: There is no such kind, field or format, a field or the encoding has no effect, or an
      extra is missing.
  """
  columns = documents.columns_of(kind, fields or {})
  if form not in (None, LINES):
    formats.FORMATS.find(str(form))
  by_suffix = [f for f in listed if not _is_lines(f, form)]
  formats.check_extras(by_suffix, None if form == LINES else form)
  if fields and not by_suffix:
    given = ",".join(f"{name}={column}" for name, column in fields.items())
    raise UserError(
      f"field={given} has no effect: the rows are lines of text, without columns; leave it out, or "
      "say the format of the file"
    )
  if encoding and len(by_suffix) == len(listed):
    formats.check_used(by_suffix, form, encoding, None)
  want = _want(kind, columns, encodings.check(encoding) if encoding else None)
  return _read(listed, kind, columns, form, want)


def _want(kind: str, columns: Mapping[str, str], encoding: str | None) -> records.Want:
  answers = ANSWERS.get(kind, ())
  required = tuple(columns[name] for name in KINDS[kind] if name in columns and name not in answers)
  wanted = tuple(columns.values())
  if kind == "retrieval":  # a passage alone may be called text
    required, wanted = (), (*wanted, "text")
  return records.Want(wanted, required, MAX_BYTES, encoding)


def _is_lines(file: files.File, form: str | None) -> bool:
  return form == LINES or (form in (None, "text") and formats.is_text(file))


def _read(
  listed: Sequence[files.File],
  kind: str,
  columns: Mapping[str, str],
  form: str | None,
  want: records.Want,
) -> Iterator[Row]:
  for file in listed:
    items = _lines(file, want) if _is_lines(file, form) else formats.read(file, want, form)
    if kind == "question_answering":
      items = questions.unfolded(items)
    for item in items:
      if isinstance(item, records.Fault):
        for _ in range(item.count):
          yield Row(item.where, {}, problem=f"{item.rule}: {item.why}")
      elif isinstance(item, records.Record):
        yield _row(item, kind, columns, want)


def _lines(file: files.File, want: records.Want) -> Iterator[records.Item]:
  """The lines of a file of text, each as a record."""
  try:
    with encodings.open_text(file, want) as stream:
      for number, line in records.lines(file, stream, want):
        where = f"{file.source}:{number}"
        if line is None:
          yield records.too_long(where, want)
        else:
          form = "utf-8-sig" if number == 1 else "utf-8"
          yield records.decoded(where, line.rstrip(b"\r\n"), form)
  except OSError as e:
    yield records.Fault("unreadable", file.source, e.strerror or str(e))


def _row(record: records.Record, kind: str, columns: Mapping[str, str], want: records.Want) -> Row:
  if isinstance(record.values, str):
    if not record.values.strip():
      return Row(record.where, {}, problem="empty: no text but white space")
    if kind == "question_answering":
      why = 'missing field: a question needs its passage: the columns "question" and "context"'
      return Row(record.where, {}, problem=why)
    # A text is in the columns' own names.
    columns = dict(zip(columns, columns, strict=True))
    record = record._replace(values=of_text(record.values, kind))
  values = record.values
  assert isinstance(values, dict)
  if kind == "retrieval" and values.get(columns["query"]) is None and "text" in values:
    columns = {**columns, "query": "text"}
  answers = ANSWERS.get(kind, ())
  found = documents.from_record(record, kind, columns, want, answers)
  if isinstance(found, records.Fault):
    return Row(found.where, {}, record.id, f"{found.rule}: {found.why}")
  fields = found.fields or {"text": found.text}
  empty = [k for k, v in fields.items() if isinstance(v, str) and not v.strip()]
  if kind != "chat" and any(name not in answers and name != "text_pair" for name in empty):
    return Row(found.source, {}, found.id, f"empty: {empty[0]} has no text but white space")
  return Row(found.source, fields, found.id)


@contextlib.contextmanager
def standard_input(stream: BinaryIO | None = None) -> Iterator[tuple[files.File, str]]:
  """Standard input as a temporary file, for readers that need one: (file, its format).

  The format is 'jsonl' if the first character is a brace, otherwise 'lines'.

  Args:
    stream: Another stream to read. None: standard input.
  """
  with tempfile.NamedTemporaryFile(prefix="jaxgpt-stdin-") as spool:
    shutil.copyfileobj(sys.stdin.buffer if stream is None else stream, spool)
    size = spool.tell()
    spool.seek(0)
    head = spool.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    spool.flush()
    yield files.File(spool.name, "stdin", size), "jsonl" if head.startswith(b"{") else LINES
