"""Files, folders, patterns and URLs to documents, in an order that no machine changes."""

import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.storage import files
from jaxgpt.text.readers import formats, records
from jaxgpt.text.readers.kinds import EXAMPLES, KINDS, MAX_BYTES

# The rules of what is broken; other rules are choices.
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
)


class Document(NamedTuple):
  """One text and where it came from.

  Attributes:
    source: file, and line or number in it: 'corpus/a/b.jsonl:7'. It holds no absolute path, so that
      what is prepared from the same files on two machines is the same: 'corpus/a/b.txt' for a file
      of the folder given as '/data/corpus'.
    text: of a labelled kind, all its texts in one: what is hashed, cleaned and compared.
    id: what the data itself calls it, or ''.
    fields: of a labelled kind, its values by name (`KINDS`); of kind text empty.
    html: the text is an HTML page, markup and all.
  """

  source: str
  text: str
  id: str = ""
  fields: dict = {}  # noqa: RUF012 (never changed)
  html: bool = False


class Dropped:
  """The account of what was left out, by rule, with the first few examples of each.

  Documents read = documents kept + sum of the counts, if each that is left out is added here.

  Attributes:
    read: documents that readers met, whether they could read them or not.
    counts: {rule: documents}.
    examples: {rule: ['file:line: why', …]}, at most `limit` a rule.
    limit: how many examples are kept.
  """

  def __init__(self, limit=EXAMPLES):
    self.read = 0
    self.counts = {}
    self.examples = {}
    self.limit = limit

  def add(self, rule, where, why, count=1):
    """Counts what was dropped: `count` documents, of which the first is at `where`."""
    self._extend(rule, count, [f"{where}: {why}"])

  def _extend(self, rule, count, examples):
    self.counts[rule] = self.counts.get(rule, 0) + count
    kept = self.examples.setdefault(rule, [])
    kept.extend(examples[: max(self.limit - len(kept), 0)])

  @property
  def kept(self):
    return self.read - sum(self.counts.values())

  def to_json(self):
    """The account as JSON can hold it, for `merge`."""
    return {"read": self.read, "counts": self.counts, "examples": self.examples}

  def merge(self, account):
    """Adds another account, as `to_json` gives it; examples come in the order of merging."""
    self.read += account["read"]
    for rule, count in account["counts"].items():
      self._extend(rule, count, account["examples"][rule])

  def check(self, max_errors):
    """Ends the run where more records were broken than the user allows.

    Args:
      max_errors: broken records (rules `ERRORS`) that are allowed; None: any number.

    Raises:
      UserError: there are more.
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
        f"{(such_as or [''])[-1]}; mend or leave out the file, or allow more"
      )

  def lines(self):
    """The report: a line for each rule, followed by its examples."""
    out = []
    for rule, count in sorted(self.counts.items()):
      out.append(f"dropped {count} by rule {rule!r}" + (", such as" if self.examples[rule] else ""))
      out.extend(f"  {example}" for example in self.examples[rule])
    return out


def chunks(text, size):
  """A text in parts of at most `size` characters, cut after a line where there is one.

  Args:
    text: a string; the parts joined are the text, and an empty text is one part.
    size: at least 1.
  """
  start = 0
  while len(text) - start > size:
    end = text.rfind("\n", start, start + size) + 1 or start + size
    yield text[start:end]
    start = end
  yield text[start:]


def find(paths, exclude=()):
  """The files to read: `files.find`, which searches folders for the suffixes of all formats."""
  return files.find(paths, exclude, formats.SUFFIXES)


def documents(
  listed, *, kind="text", fields=None, form=None, max_bytes=MAX_BYTES, max_errors=None, dropped=None
) -> Iterator[Document]:
  """Reads the documents of files, one at a time, in constant memory.

  A line of a `.jsonl` file is a document, as is a row of a table, a page of a WARC file or any
  other file (`formats.FORMATS`). What can't be read never ends the run: it is counted under the
  rules `ERRORS`, or 'empty' (nothing but white space), 'http status' and 'not text' (in WARC).

  Args:
    listed: what `find` returned, or some of it, or parts of it that `formats.split` made: any
      grouping of the same list into calls yields the same documents.
    kind: a key of `KINDS`.
    fields: {name: column}, where a column is not called like the name; 'a.b' is the key b of the
      column a.
    form: a key of `formats.FORMATS`, for all files; None: by the suffix of each.
    max_bytes: longer records are dropped. A text file that is longer becomes several documents.
    max_errors: see `Dropped.check`, of `dropped`.
    dropped: a `Dropped` to count in.

  Returns:
    An iterator of documents whose texts are not empty and have a UTF-8 form.

  Raises:
    UserError: a bad kind, field or format, a missing extra: raised by the call itself, before the
      first document. Later: too many errors.
  """
  columns = _columns(kind, fields or {})
  if form is not None and form not in formats.FORMATS:
    raise UserError(f"format={form!r}: choose one of {', '.join(formats.FORMATS)}")
  if max_bytes < 1024:
    raise UserError(f"max_record_bytes={max_bytes} must be at least 1024")
  formats.check_extras(listed, form)
  required = tuple(columns[name] for name in KINDS[kind] if name in columns)
  want = records.Want(tuple(columns.values()), required, max_bytes)
  dropped = Dropped() if dropped is None else dropped
  return _documents(listed, form, want, kind, columns, max_errors, dropped)


def _columns(kind, fields):
  """{name: column} of a kind, or a UserError."""
  if kind not in KINDS:
    raise UserError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
  names = [name.strip("[]") for name in KINDS[kind]] + ["id"]
  for name in fields:
    if name not in names:
      raise UserError(f"field {name!r} is none of kind={kind}; it has {', '.join(names)}")
  return {name: fields.get(name, name) for name in names}


def _documents(listed, form, want, kind, columns, max_errors, dropped):
  for file in listed:
    for item in formats.read(file, want, form):
      if isinstance(item, records.Record):
        item = _document(item, kind, columns)
      if isinstance(item, Document):
        if len(item.text) > want.max_bytes:
          item = records.too_long(item.source, want)
        elif not item.text or item.text.isspace():
          item = records.Fault("empty", item.source, "no text but white space")
      if isinstance(item, Document):
        dropped.read += 1
        yield item
      else:
        dropped.read += item.count
        dropped.add(*item)
        dropped.check(max_errors)


def _document(record, kind, columns):
  """A record's document, or the fault that it has none."""
  where, values = record.where, record.values
  if isinstance(values, str):
    if kind != "text":
      return records.Fault("missing field", where, f"kind={kind} needs columns, a text has none")
    values, columns = {"text": values}, {"text": "text"}
  try:
    found = {
      name: _value(values, column, f"[{name}]" in KINDS[kind] or name == "id")
      for name, column in columns.items()
    }
    if "prompt" in found:
      found["prompt"] = found["prompt"] or ""
    found = {name: value for name, value in found.items() if value is not None}
    name = str(found.pop("id", record.id))
    checked = {key: _CHECKS.get(key, _string)(key, value) for key, value in found.items()}
    if kind == "preference" and type(checked["chosen"]) is not type(checked["rejected"]):
      raise TypeError("one of chosen and rejected is a text, the other one messages")
    text = "\n".join(part for key in checked for part in _texts(key, checked[key]))
    for part in (text, name, str(checked.get("label", ""))):
      part.encode()  # "\ud800" is valid JSON, but stands for no character: it has no UTF-8 form
  except UnicodeError as e:
    return records.Fault("invalid utf-8", where, e.reason)
  except KeyError as e:
    has = ", ".join(map(repr, values))
    return records.Fault("missing field", where, f"no {e.args[0]!r} in {has[:100]}")
  except TypeError as e:
    return records.Fault("wrong type", where, str(e))
  return Document(where, text, name, {} if kind == "text" else checked, record.html)


def _value(values, column, optional):
  """A record's value in a column, or None where it may be missing."""
  top = records.top_column(column, values)
  value = values.get(top)
  if top != column:
    for key in column.split(".")[1:]:
      value = value.get(key) if isinstance(value, dict) else None
  if value is None and not optional:
    raise KeyError(column)
  return value


def _texts(name, value):
  """The texts in a field, for a document's text."""
  if isinstance(value, list):
    return [message["content"] for message in value]
  return [] if name == "label" else [value]


def _string(name, value):
  if not isinstance(value, str):
    raise TypeError(f"{name} is a {type(value).__name__}, not a string")
  return value


def _label(name, value):
  if not isinstance(value, str | int | float):
    raise TypeError(f"{name} is {str(value)[:50]!r}, neither a string nor a number")
  if not isinstance(value, str) and not abs(value) <= sys.float_info.max:
    raise TypeError(f"{name} is {str(value)[:50]}, which is no number that one can learn")
  return int(value) if isinstance(value, bool) else value


def _messages(name, value):
  """A list of {role, content}, which a table without lists may hold as JSON."""
  if isinstance(value, str):
    try:
      value = json.loads(value)
    except (ValueError, RecursionError) as e:
      raise TypeError(f"{name} is a string, but no JSON: {e}") from e
  if not isinstance(value, list):
    raise TypeError(f"{name} is a {type(value).__name__}, not a list of {{role, content}}")
  for number, message in enumerate(value, 1):
    if not (
      isinstance(message, dict)
      and isinstance(message.get("role"), str)
      and isinstance(message.get("content"), str)
    ):
      raise TypeError(f"{name}: message {number} is no {{role, content}} with two strings")
  return value


def _text_or_messages(name, value):
  return _messages(name, value) if isinstance(value, list) else _string(name, value)


_CHECKS = {
  "label": _label,
  "messages": _messages,
  "prompt": _text_or_messages,
  "chosen": _text_or_messages,
  "rejected": _text_or_messages,
}
