"""The inputs of a preparation: files, what is passed over, standard input, later changes."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.storage import files as files_lib
from jaxgpt.storage import passed_over as passed_over_lib
from jaxgpt.storage import streams
from jaxgpt.text.prepare import splits
from jaxgpt.text.readers import documents

STDIN = "-"  # the path that stands for standard input
_NAME = "stdin"  # of standard input in the names of documents
_FORMS = (  # (suffix, pattern of the first bytes)
  (".parquet", rb"PAR1"),
  (".warc", rb"WARC/"),
  (".jsonl", rb"\s*\{.*\}\s*(\n|\Z)"),
  (".json", rb'\s*(\[\s*[{"]|\{\s*")'),
)


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The files that paths stand for.

  Attributes:
    paths: The paths, with a copy of standard input in its place.
    exclude: Patterns of files to leave out.
    by_split: The files of each split, or of `splits.BY_HASH`, in order.
    own: {held-out split: the paths of its own files}.
    passed_over: The account of the others.
    notes: Lines for the report.
    stdin: The copy of standard input, or None.
  """

  paths: tuple[Any, ...]
  exclude: tuple[str, ...]
  by_split: splits.Inputs
  own: Mapping[str, Sequence[str]]
  passed_over: passed_over_lib.PassedOver
  notes: tuple[str, ...] = ()
  stdin: pathlib.Path | None = None

  @property
  def files(self) -> list[files_lib.File]:
    """The files of all splits."""
    return [file for group in self.by_split.values() for file in group]

  def report(self) -> list[str]:
    """Lines about what is not read, and about names that were changed."""
    lines = list(self.notes)
    if self.passed_over.counts:
      lines.append(f"passed over: {self.passed_over}")
    for path, source in self.passed_over.renamed.items():
      lines.append(f"{path}: an input of that name came before, so this one begins with {source}")
    return lines

  def check_unchanged(self) -> list[str]:
    """Lists the files again and compares their sizes and versions.

    Returns:
      Lines for the report about files that are new and were not read.

    Raises:
      UserError: A file changed or is gone, so that what was read may be of two states.
    """
    try:
      paths = [self.paths, *(self.own[split] for split in self.own if self.own[split])]
      listed = [documents.find(some, self.exclude) for some in paths]
      found = {file.address: file for files in listed for file in files}
    except UserError as e:
      raise UserError(f"the input changed while it was read: {e}") from e
    known = {file.address for file in self.files}
    changed = [
      file.source
      for file in self.files
      if file.address != str(self.stdin) and _state(found.get(file.address)) != _state(file)
    ]
    if changed:
      raise UserError(
        f"{len(changed):,} input file(s) changed while they were read, such as {changed[0]}; run "
        "the same command again when nothing writes to them, or prepare a copy"
      )
    new = [file.source for address, file in found.items() if address not in known]
    return [f"new since the start and not read: {len(new):,}, such as {new[0]}"] if new else []

  @contextlib.contextmanager
  def stdin_in(self, folder: pathlib.Path) -> Iterator["Inputs"]:
    """These inputs with the copy of standard input moved to a folder. It is deleted at the end.

    The folder belongs to this run alone. The copy has the same name in each run, so that a run that
    continues another one finds it there.
    """
    if self.stdin is None:
      yield self
      return
    old, new = self.stdin, folder / f"{_NAME}{self.stdin.suffix}"
    try:
      old.replace(new)
      by_split = {
        split: [f._replace(address=str(new)) if f.address == str(old) else f for f in group]
        for split, group in self.by_split.items()
      }
      paths = tuple(new if path == old else path for path in self.paths)
      yield dataclasses.replace(self, paths=paths, by_split=by_split, stdin=new)
    finally:
      new.unlink(missing_ok=True)


def _state(file: files_lib.File | None) -> Any:
  return file and (file.size, file.version)


def find(
  paths: files_lib.Paths,
  exclude: Sequence[str] = (),
  stdin: pathlib.Path | None = None,
  own: Mapping[str, Sequence[str]] | None = None,
) -> Inputs:
  """Lists the files to read.

  Args:
    paths: Files, folders, patterns and addresses. `STDIN` is standard input.
    exclude: Shell patterns of files to leave out.
    stdin: Where to copy standard input to, because files are read more than once. A suffix is
      added. None: standard input can't be read.
    own: {held-out split: the paths of its own files}.

  Raises:
    UserError: See `documents.find` and `splits.find`. Or standard input is closed, empty or named
      twice, or a pattern of `exclude` matches nothing.
  """
  given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
  notes, copy, digest = list[str](), None, ""
  if given.count(STDIN) > 1 or (STDIN in given and stdin is None):
    raise UserError("path '-' is standard input, which can be read once; name files")
  if STDIN in given and stdin is not None:
    copy, digest = _copy_stdin(stdin)
    form = copy.suffix.removeprefix(".")
    notes.append(f"standard input: read as {form}, unless --format names another format")
    given[given.index(STDIN)] = copy
  rest = passed_over_lib.PassedOver()
  found = [
    file._replace(source=_NAME, version=digest) if file.address == str(copy) else file
    for file in documents.find(given, exclude, rest)
  ]
  by_split, lines = splits.find(found, own or {}, exclude, rest)
  rest.check_exclude()
  notes += lines
  return Inputs(tuple(given), tuple(exclude), by_split, own or {}, rest, tuple(notes), copy)


def _copy_stdin(path: pathlib.Path) -> tuple[pathlib.Path, str]:
  """Copies standard input to a file whose suffix tells its format. Returns (file, digest)."""
  if sys.stdin is None or sys.stdin.closed:
    raise UserError("path '-' is standard input, which is closed; pipe the text into the command")
  digest, size = hashlib.sha256(), 0
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("wb") as out:
    while data := sys.stdin.buffer.read(streams.BUFFER):
      digest.update(data)
      size += out.write(data)
  if not size:
    raise UserError("path '-' is standard input, which is empty; pipe the text into the command")
  try:
    with streams.open_stream(files_lib.File(str(path), _NAME, size)) as stream:
      head = stream.peek(1)
  except OSError:  # reading the file reports it
    head = b""
  suffix = next((suffix for suffix, pattern in _FORMS if re.match(pattern, head)), ".txt")
  return path.rename(path.with_name(path.name + suffix)), digest.hexdigest()


@contextlib.contextmanager
def place_for_stdin(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """A path of this run alone for `find`, next to the output. A file that is left is deleted."""
  path = out.with_name(f"{out.name}.stdin-{secrets.token_hex(4)}")
  try:
    yield path
  finally:
    for suffix in ("", ".txt", *(suffix for suffix, _ in _FORMS)):
      with contextlib.suppress(OSError):
        path.with_name(path.name + suffix).unlink()
