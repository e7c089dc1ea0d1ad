"""Input files: local paths, folders, glob patterns and URLs, expanded to lists of files.

Local files need no extra. `s3://`, `gs://`, `hf://`, `http(s)://` and other schemes go through
fsspec, which reads credentials and endpoints from the usual places:

  s3://    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE.
           AWS_ENDPOINT_URL for services other than AWS.
           FSSPEC_S3_ANON=true for public buckets.
  gs://    GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`.
           STORAGE_EMULATOR_HOST for an emulator.
           FSSPEC_GS_TOKEN=anon for public buckets.
  hf://    HF_TOKEN, HF_ENDPOINT. Addresses have the form hf://datasets/OWNER/NAME/PATH.
"""

import fnmatch
import glob
import logging
import os
import pathlib
import stat
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from jaxgpt.errors import EXIT_AGAIN, UserError, optional, printable
from jaxgpt.storage.passed_over import PassedOver

COMPRESSED = (".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd")
_IGNORED = ("__pycache__",)
# Keys of fsspec's file infos that change with a file's content.
_VERSIONS = (
  "ETag",
  "etag",
  "md5Hash",
  "generation",
  "blob_id",
  "mtime",
  "LastModified",
  "Last-Modified",
  "created",
)

_OF_A_NETWORK = ("Connection", "Timeout")  # in the names of services' exceptions that may pass
_WAYS_OUT = {
  "s3": "check the address, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and "
  "AWS_ENDPOINT_URL if the service is not AWS; FSSPEC_S3_ANON=true reads public ones",
  "gs": "check the address and GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth "
  "application-default login`; FSSPEC_GS_TOKEN=anon reads public buckets",
  "hf": "check the address (hf://datasets/OWNER/NAME/PATH), and HF_TOKEN if it is private",
}
_EXTRAS = {"s3": "data,s3", "s3a": "data,s3", "gs": "data,gcs", "gcs": "data,gcs"}


Parts: TypeAlias = tuple[str, ...]  # of a path, such as ("a", "b.txt")
Paths: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"


class File(NamedTuple):
  """A file to read, or a range of its bytes: a unit of work, stored in JSON as a list.

  Attributes:
    address: Local path or URL, for `streams`.
    source: Name in documents and reports. Never an absolute path, so that two machines agree.
    size: Stored bytes of the file or range. 0: unknown.
    version: Modification time or ETag, which changes with the content. '': unknown.
    start: First byte of the range, at the start of a line.
    end: End of the range (exclusive), at the end of a line. None: the end of the file.
    line: Number of the line at `start`.
  """

  address: str
  source: str
  size: int
  version: str = ""
  start: int = 0
  end: int | None = None
  line: int = 1


class _Found(NamedTuple):
  """A file or folder found below a given path."""

  root: Parts  # name of the given folder, as a tuple of at most one name
  parts: Parts  # path below it
  file: File
  identity: Any  # equal for two paths of the same file
  why: str = ""  # the reason why it is not read


def suffix(address: str) -> str:
  """The suffix of the format, in lower case: '.jsonl' of 'a/B.JSONL.gz'."""
  stem, last = os.path.splitext(_path_of(address).lower())
  return os.path.splitext(stem)[1] if last in COMPRESSED else last


def absolute(file: File) -> File:
  """A file whose address does not depend on the working directory."""
  if scheme_of(file.address):
    return file
  return file._replace(address=os.path.abspath(file.address))


def is_zstandard(address: str) -> bool:
  """Whether an address has a suffix of Zstandard."""
  return _path_of(address).lower().endswith((".zst", ".zstd"))


def find(
  paths: Paths,
  exclude: str | Sequence[str] = (),
  suffixes: Collection[str] = (),
  passed_over: PassedOver | None = None,
) -> list[File]:
  """Lists the files that paths stand for.

  Hidden files, hidden folders and `__pycache__` are left out, unless a path names them. So are
  folders written by `jaxgpt data`, whose output may lie in the folder that is read. A subfolder
  that can't be listed is in the list like a file: reading it reports and counts the error.

  Args:
    paths: One or several files, folders (with everything below them) and glob patterns of files
      (`**` crosses folders), local or remote. An http address is one file. Files are listed in the
      order of the paths, and sorted by path within each. A file found twice is listed once.
    exclude: Shell patterns. A file is left out if one matches its path below the given folder, or
      any part of that path: 'test*' leaves out 'a/tests/b.py' and 'a/test_c.py'.
    suffixes: Suffixes, as of `suffix`, of the files to list in folders. Paths of files and patterns
      may have any.
    passed_over: The account to count the rest in.

  Returns:
    The files. Their sources differ: of two given folders of one name, the second is called
    'NAME(2)'.

  Raises:
    UserError: A path that does not exist or cannot be listed, a glob without a match, no file
      left, or an extra that is not installed.
  """
  paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
  exclude = [exclude] if isinstance(exclude, str) else list(exclude)
  rest = PassedOver() if passed_over is None else passed_over
  seen: set[Any] = set()
  names: set[str] = set()
  unused, files = set(exclude), []
  for path in paths:
    given = os.fspath(path)
    if not given:
      raise UserError("path '' is empty; name the folder to read, '.' for the current one")
    expand = _expand_remote if scheme_of(given) else _expand_local
    found = list(expand(given.removeprefix("file://"), suffixes))
    # `jaxgpt data` may write its output below the folder it reads. It must not read that again.
    prepared = _prepared({f.parts for f in found if not f.why})
    chosen = []
    for item in found:
      matching = _matching(item.parts, exclude)
      unused -= matching
      why = (
        "excluded"
        if matching
        else "prepared data"
        if any(item.parts[:n] in prepared for n in range(len(item.parts)))
        else item.why or ("found twice" if item.identity in seen else "")
      )
      if why:
        rest.add(why, printable("/".join((*item.root, *item.parts))))
      else:
        seen.add(item.identity)
        chosen.append(item)
    number, named = _named(chosen, names)
    if number > 1:
      rest.renamed[printable(given)] = named[0].source
    names.update(file.source for file in named)
    files.extend(named)
  if not files:
    raise _nothing_to_read(paths, exclude, suffixes, rest)
  rest.unused = unused if rest.unused is None else rest.unused & unused
  return files


def _nothing_to_read(
  paths: Sequence[Any], exclude: Sequence[str], suffixes: Collection[str], rest: PassedOver
) -> UserError:
  names = ", ".join(repr(os.fspath(p)) for p in paths) or "no path"
  there = f" (passed over: {rest})" if rest.counts else ""
  return UserError(
    f"no file to read in {names}{there}; folders are searched for {' '.join(sorted(suffixes))}, "
    f"without hidden files, folders that jaxgpt data wrote and exclude={list(exclude)}; name files "
    "or a glob pattern to read other suffixes"
  )


def _named(found: Sequence[_Found], taken: Collection[str]) -> tuple[int, list[File]]:
  """(number, files) of one given path. Sources differ from each other and from those `taken`.

  A folder whose name is taken gets a number, and so does a single file: 'corpus(2)/a.txt',
  'a(2).txt'. Numbers follow the order of the given paths, so they are the same on every machine.
  """
  number, names = 0, list(taken)
  while not number or not set(names).isdisjoint(taken):
    number += 1
    names = [printable("/".join(_numbered(item, number))) for item in found]
  out, own = [], set[str]()
  for item, name in zip(found, names):
    while name in own:  # two names that differ in bytes which are not UTF-8, or in controls
      name = f"{name}(2)"
    own.add(name)
    out.append(item.file._replace(source=name))
  return number, out


def _numbered(item: _Found, number: int) -> Parts:
  if number == 1:
    return (*item.root, *item.parts)
  if item.root:
    return (f"{item.root[0]}({number})", *item.parts)
  stem, dot, rest = item.parts[0].partition(".")
  return (f"{stem}({number}){dot}{rest}", *item.parts[1:])


def refuse_device(path: str | os.PathLike[str], option: str) -> None:
  """Refuses a local path that is a pipe or device: reading it may never end.

  Args:
    path: The path, which need not exist.
    option: The option that names it, for the message.

  Raises:
    UserError: It is a pipe, socket or device.
  """
  try:
    mode = 0 if scheme_of(os.fspath(path)) else os.stat(path).st_mode
  except (OSError, ValueError):  # opening it reports the error
    return
  if mode and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
    raise UserError(f"{option}={printable(os.fspath(path))} is a pipe or device; name a file")


def scheme_of(address: str) -> str:
  """'s3' of 's3://...', '' of a local path."""
  scheme, found, _ = address.partition("://")
  return scheme.lower() if found and scheme.isalnum() and scheme.lower() != "file" else ""


def _path_of(address: str) -> str:
  """The address without the query and fragment of a URL."""
  if scheme_of(address) in ("http", "https"):
    address = address.partition("?")[0].partition("#")[0]
  return address


def _matching(parts: Parts, patterns: Sequence[str]) -> set[str]:
  """The patterns that leave out the file at this path."""
  names = (*parts, "/".join(parts))
  return {
    pattern for pattern in patterns if any(fnmatch.fnmatchcase(name, pattern) for name in names)
  }


def _why_not(parts: Parts, suffixes: Collection[str]) -> str:
  """The reason why the listing of a folder does not include the file at this path, or ''."""
  if any(part.startswith(".") or part in _IGNORED for part in parts):
    return "hidden"
  found = suffix(parts[-1])
  return "" if found in suffixes else f"suffix {printable(found)}" if found else "no suffix"


def _prepared(found: Collection[Parts]) -> set[Parts]:
  """The folders, given all files, that `jaxgpt data` wrote or left unfinished."""
  return {
    parts[:-1]
    for parts in found
    if parts[-1] == "manifest.json"
    and (*parts[:-1], "card.json") in found
    and (*parts[:-1], "train.sources.txt") in found
  } | {
    parts[:-1]
    for parts in found
    if parts[-1] == "state.json" and parts[-2:-1] and parts[-2].endswith(".unfinished")
  }


def _literal_parts(parts: Parts) -> Parts:
  """The leading parts of a pattern without wildcards."""
  for i, part in enumerate(parts[:-1]):
    if glob.has_magic(part):
      return parts[:i]
  return parts[:-1]


def _expand_local(given: str, suffixes: Collection[str]) -> Iterator[_Found]:
  """Yields the files of a given local path."""
  path = pathlib.Path(given)
  try:
    exists = path.exists()
  except (OSError, ValueError) as e:
    raise UserError(
      f"path {given!r} can't be read ({getattr(e, 'strerror', None) or e}); check "
      "its spelling and permissions"
    ) from e
  if not exists:
    matches = sorted(glob.glob(given, recursive=True))
    if not matches:
      problem = "the pattern matches no file" if glob.has_magic(given) else "no such file or folder"
      raise UserError(
        f"path {given!r}: {problem}; check the spelling and the working directory ({os.getcwd()})"
      )
    root = pathlib.Path(*_literal_parts(path.parts))
    for match in map(pathlib.Path, matches):
      parts, (file, identity) = match.relative_to(root).parts, _local(os.fspath(match))
      if not match.is_dir():
        why = "pipe or device" if identity is None else ""
        yield _Found(_name_of(root), parts, file, identity, why)
      elif "**" not in given:  # `**` matches folders on its way to the files in them
        yield _Found(_name_of(root), parts, file, identity, "folder that a pattern matches")
  elif path.is_dir():
    name = _name_of(path)
    for parts, why in _walk(path, suffixes):
      file, identity = _local(os.path.join(path, *parts))
      if identity is None and not why:
        why = "pipe or device"
      yield _Found(name, parts, file, identity, why)
  elif path.is_file():
    yield _Found((), (path.name,), *_local(given))
  else:
    raise UserError(
      f"path {given!r} is a pipe or device, but files are read more than once; save its content "
      "to a file first, or pipe it into `jaxgpt data -`"
    )


def _name_of(root: pathlib.Path) -> Parts:
  name = root.resolve().name
  return (name,) if name else ()


def _local(path: str) -> tuple[File, Any]:
  """(File, identity). The identity of a pipe or device is None: reading it may never end."""
  try:
    info = os.stat(path)
  except OSError:  # such as a broken link: opening it reports the error
    return File(path, "", 0), path
  if stat.S_ISDIR(info.st_mode):  # one that can't be listed: opening it reports the error
    return File(path, "", 0), path
  key = (info.st_dev, info.st_ino) if stat.S_ISREG(info.st_mode) else None
  return File(path, "", info.st_size, str(info.st_mtime_ns)), key


def _walk(root: pathlib.Path, suffixes: Collection[str]) -> list[tuple[Parts, str]]:
  """(path, reason why it is not read or '') of all files below a folder, sorted by path.

  A hidden folder stands for everything in it. So does one that can't be listed, which is read.
  """
  found: list[tuple[Parts, str]] = []

  def fail(error: OSError) -> None:
    folder = pathlib.Path(error.filename)
    if folder != root:
      found.append((folder.relative_to(root).parts, ""))
      return
    raise UserError(
      f"folder {error.filename!r} can't be listed ({error.strerror}); change its "
      "permissions, or name what to read"
    ) from error

  # For each folder the identities of those above it: following links must not lead back to one.
  chains: dict[str, frozenset[tuple[int, int]]] = {os.fspath(root): frozenset()}
  for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
    info = os.stat(folder)
    key, chain = (info.st_dev, info.st_ino), chains.pop(folder)
    above = pathlib.Path(folder).relative_to(root).parts
    if key in chain:
      found.append((above, "found twice"))
      subfolders.clear()
      continue
    hidden = [s for s in subfolders if s.startswith(".") or s in _IGNORED]
    found.extend(((*above, s), "hidden") for s in hidden)
    subfolders[:] = [s for s in subfolders if s not in hidden]
    chains.update((os.path.join(folder, s), chain | {key}) for s in subfolders)
    found.extend(((*above, name), _why_not((name,), suffixes)) for name in names)
  return sorted(found)


def filesystem_of(address: str) -> tuple[Any, str]:
  """(fsspec's file system, the path in it) of a URL.

  Raises:
    UserError: An unknown scheme, an extra that is not installed, or missing credentials.
  """
  scheme = scheme_of(address)
  fsspec = optional("fsspec", "data", f"reading {scheme}:// addresses")
  options: dict[str, Any] = {}
  if os.environ.get("STORAGE_EMULATOR_HOST"):  # emulators lack the gRPC API that gcsfs asks first
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  # Errors that a user can act on are raised. The rest is for those who configure logging.
  logging.getLogger("gcsfs").addHandler(logging.NullHandler())
  try:
    if scheme in ("http", "https"):  # aiohttp's default ends a download after five minutes
      aiohttp = optional("aiohttp", "data", f"reading {scheme}:// addresses")
      timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
      options = {"client_kwargs": {"timeout": timeout}}
    return fsspec.core.url_to_fs(address, **options)
  except UserError:
    raise
  except ImportError as e:
    extra = _EXTRAS.get(scheme, "data")
    raise UserError(f"{address!r}: {e}; it comes with pip install 'jaxgpt[{extra}]'") from e
  except Exception as e:  # an unknown scheme, or an error of the service's own library
    raise remote_error(address, e) from e


def remote_error(address: str, error: BaseException, verb: str = "reached") -> UserError:
  """The UserError for an error of a service's own library.

  Args:
    address: The address that was worked on.
    error: The library's exception.
    verb: The operation that failed, as a participle.
  """
  scheme = scheme_of(address)
  cause = error.__cause__
  # fsspec reports an unreachable server as a missing file.
  if isinstance(error, FileNotFoundError) and cause and not isinstance(cause, FileNotFoundError):
    error = cause
  problem = (
    ": no such file or folder"
    if isinstance(error, FileNotFoundError)
    else f" can't be {verb} ({type(error).__name__}: {str(error)[:300]})"
  )
  way_out = _WAYS_OUT.get({"s3a": "s3", "gcs": "gs"}.get(scheme, scheme), "check the address")
  kinds = (kind.__name__ for kind in type(error).__mro__)
  may_pass = any(word in kind for kind in kinds for word in _OF_A_NETWORK)
  return UserError(f"{address!r}{problem}; {way_out}", EXIT_AGAIN if may_pass else 2)


def _expand_remote(given: str, suffixes: Collection[str]) -> Iterator[_Found]:
  """Yields the files of a given URL."""
  scheme = scheme_of(given)
  filesystem, path = filesystem_of(given)
  web = scheme in ("http", "https")
  try:
    # A name may contain wildcard characters, so an existing path is not a pattern. Web servers
    # have no listings: an http address is one file.
    if not web and glob.has_magic(path) and not filesystem.exists(path):
      found = filesystem.glob(path, detail=True)
      root: Parts | None = _literal_parts(tuple(path.split("/")))
    else:
      info = filesystem.info(path)
      if web or info["type"] == "file":
        root = None
        found = {path: info}
      else:
        found = filesystem.find(path, detail=True)
        root = tuple(path.rstrip("/").split("/"))
  except Exception as e:  # each service has exceptions of its own
    raise remote_error(given, e) from e
  if not found:
    raise UserError(f"path {given!r}: nothing is there; check the spelling")
  for name, info in sorted(found.items()):
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    file = File(name if web else f"{scheme}://{name}", "", info.get("size") or 0, version)
    if root is None:
      parts = tuple(part for part in _path_of(name).split("/") if part)
      yield _Found((), parts[-1:], file, file.address)
      continue
    parts = tuple(name.split("/"))[len(root) :]
    if info["type"] != "file":
      continue
    why = "" if glob.has_magic(path) else _why_not(parts, suffixes)
    yield _Found(root[-1:], parts, file, file.address, why)
