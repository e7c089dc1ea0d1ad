"""Data formats: the registry of readers, and the choice of one by file name.

A reader yields a `records.Record` for each record that it can read and a `records.Fault` for each
that it can't, in file order and in bounded memory. A broken record doesn't end the file if the
format allows finding the next one. `documents` decides which columns make a document.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from jaxgpt.config.registry import Registry
from jaxgpt.errors import UserError, optional
from jaxgpt.storage import files, streams
from jaxgpt.text.readers import conll, encodings, json_files, records, tables, text_files, warc

Reader: TypeAlias = Callable[[files.File, records.Want], Iterator[records.Item]]


class Format(NamedTuple):
  """A data format.

  Attributes:
    read: The reader.
    suffixes: Suffixes of file names, in lower case and with the dot. A compression suffix such as
      .gz may follow them.
    summary: One line for the documentation.
    module: A module from the extra `data` that the reader needs, or None.
    cut_at_lines: A large file may be cut into byte ranges at any line end, since each line is a
      record.
    has_encoding: The reader opens files with `encodings.open_text`.
  """

  read: Reader
  suffixes: tuple[str, ...]
  summary: str
  module: str | None = None
  cut_at_lines: bool = False
  has_encoding: bool = True


_TEXT_SUFFIXES = (
  ".txt .text .md .markdown .rst .tex .org .html .htm .xhtml .xml .yaml .yml .toml .ini .cfg "
  ".py .pyi .ipynb .c .h .cc .cpp .cxx .hpp .hh .cu .java .kt .scala .go .rs .swift .js .jsx .ts "
  ".tsx .css .rb .php .pl .lua .r .jl .hs .ml .clj .ex .erl .sh .bash .sql .proto .s .asm"
)

FORMATS: Registry[Format] = Registry("format")
FORMATS.add(
  "text", Format(text_files.read, tuple(_TEXT_SUFFIXES.split()), "a file is one document")
)
FORMATS.add(
  "jsonl",
  Format(
    json_files.read_lines,
    (".jsonl", ".ndjson"),
    "JSON Lines: a line is an object whose keys are columns",
    cut_at_lines=True,
  ),
)
FORMATS.add(
  "json",
  Format(
    json_files.read,
    (".json",),
    "JSON Lines, other JSON objects, or an array of them; otherwise a text",
  ),
)
FORMATS.add(
  "csv", Format(tables.read_csv, (".csv",), "comma-separated; the first row names the columns")
)
FORMATS.add(
  "tsv", Format(tables.read_tsv, (".tsv",), "tab-separated; the first row names the columns")
)
FORMATS.add(
  "conll",
  Format(conll.read, (".conll",), "tagged words: a word and its tag per line, as of CoNLL-2003"),
)
FORMATS.add(
  "parquet",
  Format(
    tables.read_parquet,
    (".parquet",),
    "Parquet tables",
    module="pyarrow.parquet",
    has_encoding=False,
  ),
)
FORMATS.add(
  "warc",
  Format(
    warc.read,
    (".warc", ".wet"),
    "web archives: pages (WARC) or their text (WET)",
    module="warcio.archiveiterator",
    has_encoding=False,
  ),
)


def suffixes() -> tuple[str, ...]:
  """Suffixes of all formats."""
  return tuple(suffix for form in FORMATS.values() for suffix in form.suffixes)


def _by_suffix(file: files.File) -> Format | None:
  suffix = files.suffix(file.address)
  return next((form for form in FORMATS.values() if suffix in form.suffixes), None)


def is_text(file: files.File) -> bool:
  """Whether a file's suffix is that of a text, or unknown, so that the file is one document."""
  return (_by_suffix(file) or FORMATS["text"]) is FORMATS["text"]


def read(file: files.File, want: records.Want, name: str | None = None) -> Iterator[records.Item]:
  """Reads the records of a file.

  Args:
    file: The file.
    want: Columns and the size limit.
    name: A key of `FORMATS`. None chooses by the file's suffix, and text if that is unknown.
  """
  form = FORMATS[name] if name else _by_suffix(file) or FORMATS["text"]
  try:
    yield from form.read(file, want)
  except OSError as e:
    yield records.Fault("unreadable", file.source, e.strerror or str(e) or type(e).__name__)


def check_extras(listed: Sequence[files.File], name: str | None = None) -> None:
  """Checks that the modules which the files need are installed, before hours of reading.

  Args:
    listed: The files.
    name: As for `read`.

  Raises:
    UserError: The module for a file's format or compression is missing.
  """
  for file in listed:
    form = FORMATS[name] if name else _by_suffix(file)
    zstandard = "zstandard" if files.is_zstandard(file.address) else None
    for module in (form and form.module, zstandard):
      if module:
        optional(module, "data", f"reading {file.source}")


def check_used(
  listed: Sequence[files.File], name: str | None, encoding: str | None, delimiter: str | None
) -> None:
  """Checks that an encoding and a delimiter are of use for at least one file.

  Args:
    listed: The files.
    name: As for `read`.
    encoding, delimiter: The options, or None if they are not given.

  Raises:
    UserError: No file has a format that they apply to, or the delimiter is not one character.
  """
  forms = [FORMATS[name] if name else _by_suffix(file) or FORMATS["text"] for file in listed]
  if encoding and not any(form.has_encoding for form in forms):
    raise UserError(f"encoding={encoding!r} has no effect: the inputs tell theirs; leave it out")
  if delimiter is None:
    return
  if len(delimiter) != 1 or delimiter in '"\r\n' or ord(delimiter) >= 0xD800:
    raise UserError(
      f"delimiter={delimiter!r} must be one character that is neither a quote nor a line end"
    )
  if FORMATS["csv"] not in forms:
    raise UserError(
      f"delimiter={delimiter!r} has no effect: no input is a .csv file; leave it out, or add "
      "format=csv"
    )


def split(
  listed: Sequence[files.File], size: int, encoding: str | None = None, name: str | None = None
) -> list[files.File]:
  """Cuts large files into byte ranges, so that several tasks can share one.

  Only local, uncompressed files of a format with `cut_at_lines`, in UTF-8, are cut. A file that is
  cut is read once to find the line number at the start of each range: a document is named after its
  line, whichever task reads it.

  Args:
    listed: The files.
    size: Size in bytes above which a file is cut, and the approximate size of a range.
    encoding: Encoding of the files. They are only cut if it is None.
    name: As for `read`, which must read the ranges with the same one.
  """
  out: list[files.File] = []
  for file in listed:
    form = FORMATS[name] if name else _by_suffix(file)
    try:
      cut = (
        file.size > size
        and encoding is None
        and file.end is None
        and form is not None
        and form.cut_at_lines
        and streams.is_plain(file)
        and encodings.is_utf8(file)
      )
      out.extend(_ranges(file, size) if cut else [file])
    except OSError:  # reading the file reports and counts it
      out.append(file)
  return out


def _ranges(file: files.File, size: int) -> list[files.File]:
  """The byte ranges of a file: each ends at the first line end after `size` bytes."""
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
