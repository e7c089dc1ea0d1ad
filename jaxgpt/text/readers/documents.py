"""Documents from files, folders, patterns and URLs, in the same order on every machine."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.storage import files
from jaxgpt.storage.passed_over import PassedOver
from jaxgpt.text.readers import encodings, formats, questions, records
from jaxgpt.text.readers import fields as fields_lib
from jaxgpt.text.readers.kinds import EXAMPLES, KINDS, MAX_BYTES

# Rules that broken records are counted under. Other rules, such as those of cleaning, are choices.
ERRORS = (
  "unreadable",
  "invalid utf-8",
  "invalid json",
  "invalid csv",
  "invalid warc",
  "binary",
  "missing field",
  "wrong type",
  "too long",
  fields_lib.UNALIGNED,
  fields_lib.NO_ANSWER,
)

NO_DOCUMENT = "files of records without a document"


class Document(NamedTuple):
  """One text and its origin.

  Attributes:
    source: File, and line or number in it: 'corpus/a/b.jsonl:7'. The path starts at the folder
      that the user gave ('corpus' for '/data/corpus'), never at the root, so that two machines
      prepare identical data from the same files.
    text: The text. For a labelled kind, all of its texts joined. They are hashed, cleaned and
      compared as one.
    id: The data's own identifier, or ''.
    fields: The values of a labelled kind by name (`KINDS`), empty for kind text.
    html: The text is an HTML page with its markup.
    group: The value of the column that decides the split, if there is one.
  """

  source: str
  text: str
  id: str = ""
  fields: dict[str, Any] = {}  # noqa: RUF012 (never changed)
  html: bool = False
  group: str | None = None


class Dropped:
  """The account of dropped documents by rule, with the first few examples of each.

  Documents read = documents kept + the sum of `counts`, if every dropped document is added.

  Attributes:
    read: Documents that the readers met, readable or not.
    counts: {rule: documents}.
    examples: {rule: ['file:line: why', …]}, at most `limit` per rule.
    notes: {remark: [files, the first few of them]}. They count no documents.
    limit: Examples to keep per rule.
  """

  def __init__(self, limit: int = EXAMPLES):
    self.read = 0
    self.counts: dict[str, int] = {}
    self.examples: dict[str, list[str]] = {}
    self.notes: dict[str, tuple[int, list[str]]] = {}
    self.limit = limit

  def note(self, what: str, names: Sequence[str], count: int = 1) -> None:
    """Notes a remark about `count` files. `names` has the first of them."""
    before, kept = self.notes.get(what, (0, []))
    self.notes[what] = before + count, [*kept, *names][: self.limit]

  def add(self, rule: str, where: str, why: str, count: int = 1) -> None:
    """Counts `count` dropped documents, the first of them at `where`."""
    self._extend(rule, count, [f"{where}: {why}"])

  def _extend(self, rule: str, count: int, examples: Sequence[str]) -> None:
    self.counts[rule] = self.counts.get(rule, 0) + count
    kept = self.examples.setdefault(rule, [])
    kept.extend(examples[: max(self.limit - len(kept), 0)])

  @property
  def kept(self) -> int:
    """Documents that were not dropped."""
    return self.read - sum(self.counts.values())

  def to_json(self) -> dict[str, Any]:
    """The account as plain JSON, for `merge`."""
    account = {"read": self.read, "counts": self.counts, "examples": self.examples}
    return account | ({"notes": self.notes} if self.notes else {})

  def merge(self, account: Mapping[str, Any]) -> None:
    """Adds another account in the form of `to_json`. Examples keep the order of merging."""
    self.read += account["read"]
    for rule, count in account["counts"].items():
      self._extend(rule, count, account["examples"][rule])
    for what, (count, names) in account.get("notes", {}).items():
      self.note(what, names, count)

  def check(self, max_errors: int | None) -> None:
    """Ends the run if more records are broken than the user allows.

    Args:
      max_errors: Broken records (rules `ERRORS`) to tolerate, or None for any number.

    Raises:
      UserError: There are more.
    """
    errors = sum(count for rule, count in self.counts.items() if rule in ERRORS)
    if max_errors is not None and errors > max_errors:
      such_as = [
        f", such as {self.examples[rule][-1]}"
        for rule in self.counts
        if rule in ERRORS and self.examples[rule]
      ]
      raise UserError(
        f"{errors:,} broken records, more than max_errors={max_errors}"
        f"{(such_as or [''])[-1]}; repair or exclude the file, or allow more"
      )

  def lines(self) -> list[str]:
    """The report: a line per rule, followed by its examples."""
    out = []
    for rule, count in sorted(self.counts.items()):
      out.append(f"dropped {count} by rule {rule!r}" + (", such as" if self.examples[rule] else ""))
      out.extend(f"  {example}" for example in self.examples[rule])
    for what, (count, names) in sorted(self.notes.items()):
      out.append(f"{what}: {count:,}" + f", such as {', '.join(names)}" * bool(names))
    return out


def chunks(text: str, size: int) -> Iterator[str]:
  """Cuts a text into chunks of at most `size` characters, after a newline where possible.

  Args:
    text: The text. The chunks joined give it back. An empty text is one chunk.
    size: Maximum length of a chunk, at least 1.
  """
  start = 0
  while len(text) - start > size:
    end = text.rfind("\n", start, start + size) + 1 or start + size
    yield text[start:end]
    start = end
  yield text[start:]


def find(
  paths: files.Paths,
  exclude: Sequence[str] = (),
  passed_over: PassedOver | None = None,
) -> list[files.File]:
  """Lists the files to read. Folders are searched for the suffixes of all formats.

  Args and errors: See `files.find`.
  """
  return files.find(paths, exclude, formats.suffixes(), passed_over)


def documents(
  listed: Sequence[files.File],
  *,
  kind: str = "text",
  fields: Mapping[str, str] | None = None,
  form: str | None = None,
  max_bytes: int = MAX_BYTES,
  max_errors: int | None = None,
  encoding: str | None = None,
  delimiter: str | None = None,
  dropped: Dropped | None = None,
  group: str = "",
) -> Iterator[Document]:
  """Reads the documents of files, one at a time, in constant memory.

  A document is a line of a `.jsonl` file, a row of a table, a page of a WARC file, or the whole of
  any other file (`formats.FORMATS`). Records that can't be read don't end the run. They are counted
  under the rules `ERRORS`, 'empty' (only white space), and for WARC 'http status' and 'not text'.

  Args:
    listed: Files from `find`, or ranges of them from `formats.split`. Any grouping of the same list
      into calls yields the same documents.
    kind: A key of `KINDS`.
    fields: {name: column} for columns that are not called like the name. 'a.b' is the key b of
      column a.
    form: A key of `formats.FORMATS` for all files. None chooses by each file's suffix.
    max_bytes: Longer records are dropped. A longer text file becomes several documents.
    max_errors: See `Dropped.check`.
    encoding: Encoding of files of text without a byte order mark. None: UTF-8.
    delimiter: Character between the fields of .csv files. None: a comma.
    dropped: The account to count in.
    group: Column of `Document.group`, which each document needs, or ''.

  Returns:
    An iterator over documents, whose texts are not empty and can be encoded in UTF-8.

  Raises:
    UserError: A bad kind, field or format, or a missing extra. Raised by the call itself, before
      the first document. While iterating: too many errors.
  """
  columns = columns_of(kind, fields or {})
  if form is not None:
    formats.FORMATS.find(form)
  if max_bytes < 1024:
    raise UserError(f"max_record_bytes={max_bytes} must be at least 1024")
  formats.check_extras(listed, form)
  required = tuple(columns[name] for name in KINDS[kind] if name in columns)
  wanted = dict.fromkeys((*columns.values(), group) if group else columns.values())
  encoding = encodings.check(encoding) if encoding else None
  want = records.Want(tuple(wanted), required, max_bytes, encoding, delimiter)
  dropped = Dropped() if dropped is None else dropped
  return _documents(listed, form, want, kind, columns, max_errors, dropped, group)


def columns_of(kind: str, fields: Mapping[str, str]) -> dict[str, str]:
  """{name: column} of a kind.

  Args:
    kind: A key of `KINDS`.
    fields: The columns that are not called like the name.

  Raises:
    UserError: There is no such kind, or it has no field of that name.
  """
  if kind not in KINDS:
    raise UserError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
  names = [name.strip("[]") for name in KINDS[kind]] + ["id"]
  for name in fields:
    if name not in names:
      raise UserError(f"field {name!r} does not exist in kind={kind}; it has {', '.join(names)}")
  return {name: fields.get(name, name) for name in names}


def _documents(
  listed: Iterable[files.File],
  form: str | None,
  want: records.Want,
  kind: str,
  columns: Mapping[str, str],
  max_errors: int | None,
  dropped: Dropped,
  group: str,
) -> Iterator[Document]:
  is_plain, text_column = kind == "text" and not group, columns.get("text", "")
  id_columns = frozenset((columns["id"], columns["id"].partition(".")[0]))
  for file in listed:
    kept, broken = 0, False
    found = formats.read(file, want, form)
    for read in questions.unfolded(found) if kind == "question_answering" else found:
      item: Document | records.Fault
      if isinstance(read, records.Record):
        if is_plain and (plain := _plain(read, text_column, id_columns, want.max_bytes)):
          dropped.read += 1
          kept += 1
          yield plain
          continue
        item = from_record(read, kind, columns, want)
        if group and isinstance(item, Document):
          item = _in_group(item, read.values, group)
      elif isinstance(read, records.Note):
        dropped.note(read.what, [read.where])
        continue
      else:
        item = read
      if isinstance(item, Document):
        if len(item.text) > want.max_bytes:
          item = records.too_long(item.source, want)
        elif not item.text or item.text.isspace():
          item = records.Fault("empty", item.source, "no text but white space")
      if isinstance(item, Document):
        dropped.read += 1
        kept += 1
        yield item
      else:
        broken |= item.where == file.source  # the whole file: no need to say it twice
        dropped.read += item.count
        dropped.add(*item)
        dropped.check(max_errors)
    if not (kept or broken or file.end is not None):
      dropped.note(NO_DOCUMENT, [file.source])


def _plain(
  record: records.Record, column: str, id_columns: frozenset[str], max_bytes: int
) -> Document | None:
  """A record's document of kind text, if nothing about it is special: 3 times as fast.

  Else None, and `_document` looks: there is an identifier, or no text that can be kept.
  """
  values, text = record.values, None
  if isinstance(values, str):
    text = values
  elif id_columns.isdisjoint(values):
    text = values.get(column)
  else:
    return None
  if type(text) is not str or text.isspace() or not 0 < len(text) <= max_bytes:
    return None
  if not (text.isascii() and record.id.isascii()):
    try:
      text.encode()
      record.id.encode()
    except UnicodeEncodeError:
      return None
  return Document(record.where, text, record.id, html=record.html)


def _in_group(
  document: Document, values: Mapping[str, Any] | str, column: str
) -> Document | records.Fault:
  """A document with its group, or a fault if its record has none. 1 and 1.0 are one group."""
  value = None if isinstance(values, str) else _value(values, column, optional=True)
  if value is None:
    has = "a text has no columns" if isinstance(values, str) else _listed(values)
    return records.Fault("missing field", document.source, f"no {column!r} to split by: {has}")
  if not isinstance(value, str | int | float):
    why = f"{column} is a {type(value).__name__}, and splits follow a string or a number"
    return records.Fault("wrong type", document.source, why)
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  return document._replace(group=str(value).encode("utf-8", "backslashreplace").decode())


def _listed(values: Mapping[str, Any]) -> str:
  return f"it has {', '.join(map(repr, values))}"[:100]


def from_record(
  record: records.Record,
  kind: str,
  columns: Mapping[str, str],
  want: records.Want,
  optional: Collection[str] = (),
) -> Document | records.Fault:
  """A record's document, or a fault if its columns are missing or of the wrong type.

  Args:
    record: The record.
    kind: A key of `KINDS`.
    columns: {name: column} of the kind, from `columns_of`.
    want: The request that the record was read for.
    optional: Names that may be missing, besides those that the kind allows to be: the answers, in
      rows to predict.
  """
  where, values = record.where, record.values
  if isinstance(values, str):
    if kind != "text":
      return records.Fault(
        "missing field", where, f"kind={kind} needs columns, but a text has none"
      )
    values, columns = {"text": values}, {"text": "text"}
  try:
    found = {
      name: _value(values, column, f"[{name}]" in KINDS[kind] or name in ("id", *optional))
      for name, column in columns.items()
    }
    if "prompt" in found:
      found["prompt"] = found["prompt"] or ""
    found = {name: value for name, value in found.items() if value is not None}
    name = str(found.pop("id", record.id))
    checked = fields_lib.check(kind, found)
    text = "\n".join(string for key in checked for string in fields_lib.texts(key, checked[key]))
    for string in (text, name, *fields_lib.names(checked)):
      string.encode()  # fails for a lone surrogate: "\ud800" is valid JSON but not a character
  except UnicodeEncodeError as e:
    half = e.object[e.start]
    why = (
      "a character is half of a surrogate pair"
      if half < "\udc80"
      else f"bytes that are not {want.encoding or 'UTF-8'}; --encoding names another encoding"
    )
    return records.Fault("invalid utf-8", where, why)
  except KeyError as e:
    has = ", ".join(map(repr, values))
    return records.Fault("missing field", where, f"no {e.args[0]!r} in {has[:100]}")
  except TypeError as e:
    return records.Fault("wrong type", where, str(e))
  except fields_lib.Unusable as e:
    return records.Fault(e.rule, where, e.why)
  return Document(where, text, name, {} if kind == "text" else checked, record.html)


def _value(values: Mapping[str, Any], column: str, optional: bool) -> Any:
  """A record's value in a column, or None if it is optional and missing."""
  top = records.top_column(column, values)
  value = values.get(top)
  if top != column:
    for key in column.split(".")[1:]:
      value = value.get(key) if isinstance(value, dict) else None
  if value is None and not optional:
    raise KeyError(column)
  return value
