"""Files, folders and glob patterns to documents, in an order that no machine changes."""

import fnmatch
import glob
import json
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from jaxgpt.errors import UserError

EXAMPLES = 5  # dropped documents that a `Dropped` remembers by name, per rule


class Document(NamedTuple):
  """One text and where it came from.

  `source` holds no absolute path, so that what is prepared from the same files on two machines
  is the same: 'corpus/a/b.txt' for a file of the folder given as '/data/corpus'.
  """
  source: str
  text: str


class Dropped:
  """What was left out, by rule: rule -> count, and the first few examples of each.

  Attributes:
    counts: {rule: documents}.
    examples: {rule: ['file:line: why', …]}, at most `EXAMPLES` a rule.
  """

  def __init__(self):
    self.counts = {}
    self.examples = {}

  def add(self, rule, where, why):
    self.counts[rule] = self.counts.get(rule, 0) + 1
    examples = self.examples.setdefault(rule, [])
    if len(examples) < EXAMPLES:
      examples.append(f"{where}: {why}")

  def lines(self):
    """The report: a line for each rule, followed by its examples."""
    out = []
    for rule, count in sorted(self.counts.items()):
      out.append(f"dropped {count} by rule {rule!r}, such as")
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


class _File(NamedTuple):
  path: pathlib.Path
  source: str


def documents(paths, *, text_field="text", exclude=(), dropped=None) -> Iterator[Document]:
  """Reads documents, one at a time.

  A `.jsonl` file holds one document a line, any other file is one document. In a folder, only
  the suffixes of `READERS` are read; hidden files, hidden folders and `__pycache__` are not.
  What can't be read never ends the run: it is counted in `dropped` under the rules 'unreadable',
  'invalid utf-8', 'invalid json', 'missing field', 'not a string' and 'empty' (nothing but
  white space).

  Args:
    paths: files, folders (with all below them) and glob patterns of files (`**` crosses
      folders), or one of them. They are read in the given order, each sorted by path; a
      file met twice is read once.
    text_field: key of the text in a JSON line.
    exclude: patterns as in a shell. A file is left out where one matches its path below the given
      folder, or any part of that: 'test*' leaves out 'a/tests/b.py' and 'a/test_c.py'.
    dropped: a `Dropped` to count in.

  Returns:
    An iterator of documents whose texts are not empty and have a UTF-8 form.

  Raises:
    UserError: a path that does not exist, a pattern without a match, no file left to read. Raised
      by the call itself, before the first document.
  """
  files = _find(paths, exclude)
  return _read_all(files, text_field, Dropped() if dropped is None else dropped)


def _find(paths, exclude):
  paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
  exclude = [exclude] if isinstance(exclude, str) else list(exclude)
  seen, files = set(), []
  for given in paths:
    for file in _expand(os.fspath(given), exclude):
      key = os.path.realpath(file.path)
      if key not in seen:
        seen.add(key)
        files.append(file)
  if not files:
    given = ", ".join(repr(os.fspath(p)) for p in paths) or "no path"
    raise UserError(f"no file to read in {given}; folders are searched for "
                    f"{' '.join(sorted(READERS))}, hidden files and exclude={exclude} left out; "
                    "name files or a glob pattern to read other suffixes")
  return files


def _expand(given, exclude):
  """The files that one given path stands for."""
  path = pathlib.Path(given)
  if not path.exists():
    matches = sorted(glob.glob(given, recursive=True))
    if not matches:
      what = "the pattern matches no file" if glob.has_magic(given) else "no such file or folder"
      raise UserError(f"path {given!r}: {what}; check the spelling and the working directory "
                      f"({os.getcwd()})")
    root = pathlib.Path(*_literal_parts(path))
    for match in map(pathlib.Path, matches):
      if match.is_file() and not _excluded(match.relative_to(root).parts, exclude):
        yield _File(match, _source(root, match.relative_to(root).parts))
  elif path.is_dir():
    for parts in _walk(path):
      if not _excluded(parts, exclude):
        yield _File(path.joinpath(*parts), _source(path, parts))
  elif not _excluded((path.name,), exclude):
    yield _File(path, path.name)


def _literal_parts(pattern):
  """The leading parts of a pattern that hold no wildcard."""
  parts = []
  for part in pattern.parts[:-1]:
    if glob.has_magic(part):
      break
    parts.append(part)
  return parts


def _walk(root):
  """Relative parts of the files below a folder that `READERS` knows, sorted."""
  found = []
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = [s for s in subfolders if not s.startswith(".") and s != "__pycache__"]
    above = pathlib.Path(folder).relative_to(root).parts
    found.extend(above + (name,) for name in names
                 if not name.startswith(".") and pathlib.Path(name).suffix.lower() in READERS)
  return sorted(found)


def _excluded(parts, patterns):
  names = parts + ("/".join(parts),)
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _source(root, parts):
  return "/".join(((root.resolve().name,) if root.resolve().name else ()) + tuple(parts))


def _read_all(files, text_field, dropped):
  for file in files:
    read = READERS.get(file.path.suffix.lower(), _whole)
    try:
      for document in read(file, text_field, dropped):
        if document.text.isspace() or not document.text:
          dropped.add("empty", document.source, "no text but white space")
        else:
          yield document
    except OSError as e:
      dropped.add("unreadable", file.source, e.strerror or str(e))


def _whole(file, text_field, dropped):
  """A text file is one document; a byte order mark is no part of it."""
  del text_field
  try:
    yield Document(file.source, file.path.read_bytes().decode("utf-8-sig"))
  except UnicodeDecodeError as e:
    dropped.add("invalid utf-8", file.source, f"{e.reason} at byte {e.start}")


def _json_lines(file, text_field, dropped):
  with file.path.open("rb") as lines:
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      source = f"{file.source}:{number}"
      try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        # "\ud800" is valid JSON, but stands for no character: it has no UTF-8 form.
        text = value[text_field]
        text.encode()
      except UnicodeError as e:
        dropped.add("invalid utf-8", source, e.reason)
      except (ValueError, RecursionError) as e:
        dropped.add("invalid json", source, str(e))
      except (KeyError, TypeError, IndexError):
        has = ", ".join(map(repr, value)) if isinstance(value, dict) else type(value).__name__
        dropped.add("missing field", source, f"no key {text_field!r} in {has[:100]}")
      except AttributeError:
        dropped.add("not a string", source, f"{text_field!r} is a {type(text).__name__}")
      else:
        yield Document(source, text)


_TEXT_SUFFIXES = (
    ".txt .text .md .markdown .rst .tex .org .html .xml .csv .tsv .json .yaml .yml .toml .ini .cfg "
    ".py .pyi .ipynb .c .h .cc .cpp .cxx .hpp .hh .cu .java .kt .scala .go .rs .swift .js .jsx .ts "
    ".tsx .css .rb .php .pl .lua .r .jl .hs .ml .clj .ex .erl .sh .bash .sql .proto .s .asm")

# suffix -> function(file, text_field, dropped) that yields documents. A new format is a row.
READERS = {".jsonl": _json_lines, ".ndjson": _json_lines,
           **dict.fromkeys(_TEXT_SUFFIXES.split(), _whole)}
