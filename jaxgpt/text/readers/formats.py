"""A table of formats, and a reader for each: a file to its records, one by one, in bounded memory.

A reader yields a `Record` for what it can read and a `Fault` for what it can't, in the order of the
file; what is wrong with one record never ends the file, where the format lets one find the next.
Which columns make a document is decided in `read`.
"""

import codecs
import itertools
import json
import re
from collections.abc import Callable
from typing import NamedTuple

from jaxgpt.errors import optional
from jaxgpt.storage import files, streams
from jaxgpt.text.readers import records, tables, warc

_BEFORE_ELEMENTS = re.compile(r"\s*\[\s*(\])?")
_AFTER_ELEMENT = re.compile(r"\s*(?:,\s*|(\]))")


def read(file, want, name=None):
  """Reads a file: an iterator of `records.Record` and `records.Fault`.

  Args:
    file: a `files.File`.
    want: a `records.Want`.
    name: a key of `FORMATS`; None: by the file's suffix, and text where that is unknown.
  """
  name = name or _BY_SUFFIX.get(files.suffix(file.address), "text")
  try:
    yield from FORMATS[name].read(file, want)
  except OSError as e:
    yield records.Fault("unreadable", file.source, e.strerror or str(e) or type(e).__name__)


def check_extras(listed, name=None):
  """Says now, and not after hours of reading, that a file needs an extra.

  Raises:
    UserError: there is no module for a file's format or compression.
  """
  for file in listed:
    form = name or _BY_SUFFIX.get(files.suffix(file.address))
    for module in (_MODULES.get(form), "zstandard" if files.is_zstandard(file.address) else None):
      if module:
        optional(module, "data", f"reading {file.source}")


def split(listed, size):
  """Cuts large files into byte ranges, so that several tasks can share one.

  Only local JSON Lines files that are not compressed are cut, others stay whole. A file that is
  cut is read once, to know the number of each range's first line: documents are called after
  their line, whoever reads them.

  Args:
    listed: list of `files.File`.
    size: bytes above which a file is cut, into ranges of about this size.
  """
  out = []
  for file in listed:
    try:
      cut = (
        file.size > size
        and file.end is None
        and _BY_SUFFIX.get(files.suffix(file.address)) == "jsonl"
        and streams.is_plain(file)
      )
      out.extend(_ranges(file, size) if cut else [file])
    except OSError:  # told again, and counted, when it is read
      out.append(file)
  return out


def _ranges(file, size):
  with streams.open_random(file) as stream:
    ranges, start, line, lines, position = [], 0, 1, 0, 0
    while position < file.size:
      data = stream.read(min(streams.BUFFER, start + size - position))
      if not data:
        break
      position, lines = position + len(data), lines + data.count(b"\n")
      if position < start + size:
        continue
      while (rest := stream.readline(streams.BUFFER)) and not rest.endswith(b"\n"):
        position += len(rest)
      position, lines = position + len(rest), lines + bool(rest)
      ranges.append(file._replace(start=start, end=position, line=line, size=position - start))
      start, line = position, 1 + lines
    if position > start:
      ranges.append(file._replace(start=start, end=position, line=line, size=position - start))
  return ranges


def _read_text(file, want):
  """A text file is one document, unless it is longer than `max_bytes`: then it is cut after lines.

  A byte order mark is no part of it.
  """
  html = files.suffix(file.address) in (".html", ".htm", ".xhtml")
  with streams.open_stream(file) as stream:
    line, left = 1, b""
    for number in itertools.count():
      data = _read_up_to(stream, want.max_bytes + 1, left)
      more = len(data) > want.max_bytes
      end = (
        data.rfind(b"\n", 0, want.max_bytes) + 1 or _whole_characters(data, want.max_bytes)
        if more
        else len(data)
      )
      data, left = data[:end], data[end:]
      where = f"{file.source}:{line}" if more or number else file.source
      yield records.decoded(where, data, "utf-8" if number else "utf-8-sig", html)
      line += data.count(b"\n")
      if not more:
        return


def _read_up_to(stream, size, data=b""):
  """`data`, and as much of a stream as makes it `size` bytes or is left."""
  parts, length = [data], len(data)
  while length < size and (part := stream.read(min(streams.BUFFER, size - length))):
    parts.append(part)
    length += len(part)
  return b"".join(parts)


def _whole_characters(data, end):
  """The last end of a UTF-8 character up to `end`."""
  while end > 1 and data[end] & 0xC0 == 0x80:
    end -= 1
  return end


def _read_jsonl(file, want):
  with streams.open_stream(file) as stream:
    for number, line in records.lines(file, stream, want):
      where = f"{file.source}:{number}"
      if line is None:
        yield records.too_long(where, want)
      elif line.strip():
        yield _json_record(where, line, "utf-8-sig" if number == 1 else "utf-8")


def _json_record(where, line, encoding):
  try:
    value = json.loads(line.decode(encoding))
  except UnicodeDecodeError as e:
    return records.Fault("invalid utf-8", where, f"{e.reason} at byte {e.start}")
  except (ValueError, RecursionError) as e:
    return records.Fault("invalid json", where, str(e))
  return records.from_object(where, value)


def _read_json(file, want):
  """JSON Lines or an array of objects, if the first object has a wanted column; else a text."""
  head = _head(file).removeprefix(codecs.BOM_UTF8).lstrip()
  array = head.startswith(b"[")
  try:
    head = head.removeprefix(b"[").decode("utf-8", "replace").lstrip()
    value, end = json.JSONDecoder().raw_decode(head)
    rows = (
      isinstance(value, dict)
      and not set(want.required).isdisjoint(value)
      and (array or "\n" not in head[:end])
    )
  except (ValueError, RecursionError):
    rows = False
  return (_read_array if array else _read_jsonl)(file, want) if rows else _read_text(file, want)


def _head(file):
  """The first bytes of a file, as many as can be had of `BUFFER`."""
  head = b""
  try:
    with streams.open_stream(file) as stream:
      while len(head) < streams.BUFFER and (data := stream.read1(streams.BUFFER - len(head))):
        head += data
  except OSError:  # comes again in the reader
    pass
  return head


def _read_array(file, want):
  """The elements of one JSON array; a broken one ends it, as there is no next line to go to."""
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


_TEXT_SUFFIXES = (
  ".txt .text .md .markdown .rst .tex .org .html .htm .xhtml .xml .yaml .yml .toml .ini .cfg "
  ".py .pyi .ipynb .c .h .cc .cpp .cxx .hpp .hh .cu .java .kt .scala .go .rs .swift .js .jsx .ts "
  ".tsx .css .rb .php .pl .lua .r .jl .hs .ml .clj .ex .erl .sh .bash .sql .proto .s .asm"
)


class Format(NamedTuple):
  """A format: function(file, want) -> iterator of Record and Fault, and the suffixes it has."""

  read: Callable
  suffixes: tuple


# A new format is a row.
FORMATS = {
  "text": Format(_read_text, tuple(_TEXT_SUFFIXES.split())),
  "jsonl": Format(_read_jsonl, (".jsonl", ".ndjson")),
  "json": Format(_read_json, (".json",)),
  "csv": Format(tables.read_csv, (".csv",)),
  "tsv": Format(tables.read_tsv, (".tsv",)),
  "parquet": Format(tables.read_parquet, (".parquet",)),
  "warc": Format(warc.read, (".warc", ".wet")),
}
_MODULES = {"parquet": "pyarrow.parquet", "warc": "warcio.archiveiterator"}
_BY_SUFFIX = {suffix: name for name, row in FORMATS.items() for suffix in row.suffixes}
SUFFIXES = tuple(_BY_SUFFIX)
