"""Addresses: local paths, folders, patterns and URLs, to the files they stand for.

Local files need no extra. `s3://`, `gs://`, `hf://`, `http(s)://` and whatever else fsspec knows go
through fsspec, which finds credentials and endpoints as its users know them:

  s3://    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE; AWS_ENDPOINT_URL where it is
           another's service; FSSPEC_S3_ANON=true for public buckets
  gs://    GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth application-default login`;
           STORAGE_EMULATOR_HOST; FSSPEC_GS_TOKEN=anon for public buckets
  hf://    HF_TOKEN, HF_ENDPOINT; hf://datasets/OWNER/NAME/PATH
"""

import fnmatch
import glob
import logging
import os
import pathlib
import stat
from typing import NamedTuple

from jaxgpt.errors import UserError, optional

COMPRESSED = (".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd")
_IGNORED = ("__pycache__",)
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
)  # keys of fsspec's infos that change with a file's content

_WAYS_OUT = {
  "s3": "check the address, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and "
  "AWS_ENDPOINT_URL if it is no AWS bucket; FSSPEC_S3_ANON=true reads public ones",
  "gs": "check the address and GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth "
  "application-default login`; FSSPEC_GS_TOKEN=anon reads public buckets",
  "hf": "check the address (hf://datasets/OWNER/NAME/PATH), and HF_TOKEN if it is private",
}
_EXTRAS = {"s3": "data,s3", "s3a": "data,s3", "gs": "data,gcs", "gcs": "data,gcs"}


class File(NamedTuple):
  """A file to read, or a range of its bytes: a unit of work, which JSON holds as a list.

  Attributes:
    address: local path or URL, for `streams`.
    source: what documents and reports call it; no absolute path, so that it is the same on two
      machines.
    size: bytes as they are stored, of the range where there is one; 0: not told.
    version: changes when the content does (modification time, ETag); '': not told.
    start, end: the range of bytes [start, end), which begins and ends with a line; None: all of it.
    line: number of the line at `start`.
  """

  address: str
  source: str
  size: int
  version: str = ""
  start: int = 0
  end: int | None = None
  line: int = 1


def suffix(address):
  """The suffix that tells the format, in lower case: '.jsonl' of 'a/B.JSONL.gz'."""
  stem, last = os.path.splitext(_path_of(address).lower())
  return os.path.splitext(stem)[1] if last in COMPRESSED else last


def is_zstandard(address):
  return _path_of(address).lower().endswith((".zst", ".zstd"))


def find(paths, exclude=(), suffixes=()):
  """Lists the files that paths stand for.

  Args:
    paths: files, folders (with all below them) and glob patterns of files (`**` crosses
      folders), local or remote, or one of them; an http address is one file. They are listed in
      the given order, each sorted by path; a file met twice is listed once. Hidden files, hidden
      folders and `__pycache__` are left out, unless a path names them, and so are folders that
      `jaxgpt data` wrote: its output may lie in the folder that is read.
    exclude: patterns as in a shell. A file is left out where one matches its path below the given
      folder, or any part of that: 'test*' leaves out 'a/tests/b.py' and 'a/test_c.py'.
    suffixes: what a folder is searched for, after `suffix`; files and patterns may name others.

  Returns:
    A list of `File`.

  Raises:
    UserError: a path that does not exist or can't be listed, a pattern without a match, no file
      left, or a missing extra.
  """
  paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
  exclude = [exclude] if isinstance(exclude, str) else list(exclude)
  seen, files = set(), []
  for given in map(os.fspath, paths):
    if not given:
      raise UserError("path '' is empty; name the folder to read, '.' for this one")
    expand = _expand_remote if scheme_of(given) else _expand_local
    found = list(expand(given.removeprefix("file://"), suffixes))
    prepared = _prepared({parts for _, parts, _, _ in found})
    for root, parts, file, key in found:
      if (
        key not in seen
        and not _excluded(parts, exclude)
        and not any(parts[:n] in prepared for n in range(len(parts)))
      ):
        seen.add(key)
        files.append(file._replace(source=_printable("/".join((*root, *parts)))))
  if not files:
    given = ", ".join(repr(os.fspath(p)) for p in paths) or "no path"
    raise UserError(
      f"no file to read in {given}; folders are searched for "
      f"{' '.join(sorted(suffixes))}, hidden files, what jaxgpt data wrote and "
      f"exclude={exclude} left out; name files or a glob pattern to read other "
      "suffixes"
    )
  return files


def scheme_of(address):
  """'s3' of 's3://…'; '' of a local path."""
  scheme, found, _ = address.partition("://")
  return scheme.lower() if found and scheme.isalnum() and scheme.lower() != "file" else ""


def _path_of(address):
  """The address without the query and fragment that a URL may have."""
  if scheme_of(address) in ("http", "https"):
    address = address.partition("?")[0].partition("#")[0]
  return address


def _printable(name):
  """A name as UTF-8 can hold it: a file's name may be any bytes."""
  return name.encode("utf-8", "backslashreplace").decode()


def _excluded(parts, patterns):
  names = (*parts, "/".join(parts))
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _wanted(parts, suffixes):
  """Whether a folder's listing takes a file with these parts below the folder."""
  return (
    not any(part.startswith(".") or part in _IGNORED for part in parts)
    and suffix(parts[-1]) in suffixes
  )


def _prepared(found):
  """The folders among the parts that `jaxgpt data` wrote, or left unfinished."""
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


def _literal_parts(parts):
  """The leading parts of a pattern that hold no wildcard."""
  for i, part in enumerate(parts[:-1]):
    if glob.has_magic(part):
      return parts[:i]
  return parts[:-1]


def _expand_local(given, suffixes):
  """(name of the root, parts below it, File, its identity) for each file of one given path."""
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
      what = "the pattern matches no file" if glob.has_magic(given) else "no such file or folder"
      raise UserError(
        f"path {given!r}: {what}; check the spelling and the working directory ({os.getcwd()})"
      )
    root = pathlib.Path(*_literal_parts(path.parts))
    for match in map(pathlib.Path, matches):
      if match.is_file():
        yield _name_of(root), match.relative_to(root).parts, *_local(os.fspath(match))
  elif path.is_dir():
    root = _name_of(path)
    for parts in _walk(path, suffixes):
      file, key = _local(os.path.join(path, *parts))
      if key is not None:
        yield root, parts, file, key
  elif path.is_file():
    yield (), (path.name,), *_local(given)
  else:
    raise UserError(
      f"path {given!r} is a pipe or device, and files are read more than once; save "
      "its content to a file first"
    )


def _name_of(root):
  name = root.resolve().name
  return (name,) if name else ()


def _local(path):
  """(File, what tells it from all others; None: a pipe or device, whose reading may never end)."""
  try:
    info = os.stat(path)
  except OSError:  # such as a link to nothing: opening it says so, in the account
    return File(path, "", 0), path
  key = (info.st_dev, info.st_ino) if stat.S_ISREG(info.st_mode) else None
  return File(path, "", info.st_size, str(info.st_mtime_ns)), key


def _walk(root, suffixes):
  """Relative parts of what is below a folder and is no folder, sorted."""

  def fail(error):
    raise UserError(
      f"folder {error.filename!r} can't be listed ({error.strerror}); change its "
      "permissions, or name what to read"
    ) from error

  found = []
  chains = {os.fspath(root): frozenset()}  # the folders above each: a link may lead back
  for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
    info = os.stat(folder)
    key, chain = (info.st_dev, info.st_ino), chains.pop(folder)
    if key in chain:
      subfolders.clear()
      continue
    subfolders[:] = [s for s in subfolders if not s.startswith(".") and s not in _IGNORED]
    chains.update((os.path.join(folder, s), chain | {key}) for s in subfolders)
    above = pathlib.Path(folder).relative_to(root).parts
    found.extend((*above, name) for name in names if _wanted((name,), suffixes))
  return sorted(found)


def filesystem_of(address):
  """(fsspec's file system, the path in it) of a URL."""
  scheme = scheme_of(address)
  fsspec = optional("fsspec", "data", f"reading {scheme}:// addresses")
  options = {}
  if os.environ.get("STORAGE_EMULATOR_HOST"):  # emulators lack the gRPC API that gcsfs asks first
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  # We say ourselves what a user can act on; who sets up logging hears the rest.
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
  except Exception as e:  # an unknown scheme, or what the service's own library says
    raise remote_error(address, e) from e


def remote_error(address, error, verb="reached"):
  """The UserError for what a service's own library raised, where an address can't be `verb`."""
  scheme = scheme_of(address)
  cause = error.__cause__
  if isinstance(error, FileNotFoundError) and cause and not isinstance(cause, FileNotFoundError):
    error = cause  # fsspec calls a server that can't be reached a missing file
  what = (
    ": no such file or folder"
    if isinstance(error, FileNotFoundError)
    else f" can't be {verb} ({type(error).__name__}: {str(error)[:300]})"
  )
  way_out = _WAYS_OUT.get({"s3a": "s3", "gcs": "gs"}.get(scheme, scheme), "check the address")
  return UserError(f"{address!r}{what}; {way_out}")


def _expand_remote(given, suffixes):
  """As `_expand_local`, for a URL."""
  scheme = scheme_of(given)
  filesystem, path = filesystem_of(given)
  web = scheme in ("http", "https")
  try:
    if not web and glob.has_magic(path) and not filesystem.exists(path):
      found = filesystem.glob(path, detail=True)
      root = _literal_parts(tuple(path.split("/")))
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
      yield (), parts[-1:], file, file.address
      continue
    parts = tuple(name.split("/"))[len(root) :]
    if info["type"] != "file":
      continue
    if glob.has_magic(path) or _wanted(parts, suffixes):
      yield root[-1:], parts, file, file.address
