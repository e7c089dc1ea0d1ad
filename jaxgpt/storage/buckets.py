"""Buckets (s3://, gs://): files fetched into a cache on this machine, and folders uploaded.

The cache is the folder JAXGPT_CACHE, or ~/.cache/jaxgpt if that is not set. `files` explains
credentials and endpoints.
"""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.storage import files, os_errors
from jaxgpt.storage.paths import sha256

UNFINISHED = "unfinished"  # name of a file that marks a remote folder as being written


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Whether a path is an address such as s3://bucket/folder."""
  return bool(files.scheme_of(os.fspath(path)))


def cache_folder() -> pathlib.Path:
  """The folder of local copies of remote files."""
  return pathlib.Path(os.environ.get("JAXGPT_CACHE") or pathlib.Path.home() / ".cache" / "jaxgpt")


@contextlib.contextmanager
def named_errors(address: str | os.PathLike[str], verb: str) -> Iterator[None]:
  """Turns errors of a service's library into a UserError with the address.

  Args:
    address: The address that is worked on.
    verb: The operation as a participle, such as 'read'.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as e:  # each service has exceptions of its own
    raise files.remote_error(os.fspath(address), e, verb) from e


def check(path: str | os.PathLike[str], verb: str = "reached") -> None:
  """Raises a UserError if a remote path cannot be reached. Accepts every local path."""
  if is_remote(path):
    filesystem, inside = files.filesystem_of(os.fspath(path))
    with named_errors(path, verb):
      filesystem.exists(inside)


def sizes(folder: str | os.PathLike[str], names: Collection[str]) -> dict[str, int]:
  """Sizes of files in a folder, with a single request to a bucket.

  Args:
    folder: A local or remote folder.
    names: Names of the files to look for.

  Returns:
    {name: size in bytes} of the files that exist. A bucket may add files not in `names`.
  """
  if not is_remote(folder):
    paths = {name: pathlib.Path(folder, name) for name in names}
    return {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
  filesystem, inside = files.filesystem_of(os.fspath(folder))
  with named_errors(folder, "listed"):
    found = filesystem.ls(inside, detail=True, refresh=True)
  return {
    pathlib.PurePosixPath(info["name"]).name: info["size"]
    for info in found
    if info["type"] == "file"
  }


class Files:
  """The files of a prepared folder on this machine. Picklable.

  Files of a local folder are used in place. A file in a bucket is copied to the cache the first
  time it is asked for.

  Attributes:
    address: Path or address of the folder.
    folder: The local folder with the files.
  """

  def __init__(self, address: str | os.PathLike[str], digest: str):
    """Makes the object, without reading anything.

    Args:
      address: Path or address of the folder.
      digest: Digest of the folder's content, which names the copies.
    """
    self.address, self._are_copies = os.fspath(address), is_remote(address)
    self.folder = cache_folder() / "data" / digest if self._are_copies else pathlib.Path(address)

  def get(self, entry: Mapping[str, Any]) -> pathlib.Path:
    """The local path of a file, which is fetched if needed.

    Args:
      entry: The file's {'name', 'size', 'sha256'} in the manifest. A fetched copy must match it.

    Raises:
      UserError: The file cannot be fetched or stored, or does not match the manifest.
    """
    path = self.folder / entry["name"]
    if not self._are_copies or _has_size(path, entry):
      return path
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      with (self.folder / f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # threads and processes share the copy
        if not _has_size(path, entry):
          self._fetch(entry, path)
    except OSError as e:
      raise UserError(
        f"{path} can't be written ({e.strerror or e}): copies of remote data are kept "
        "there; make room, or set JAXGPT_CACHE to another folder",
        exit_code=os_errors.exit_code(e),
      ) from e
    return path

  def _fetch(self, entry: Mapping[str, Any], path: pathlib.Path) -> None:
    # Other processes test for the file without the lock, so it must appear complete.
    part = path.with_name(f"{path.name}.part")
    address = f"{self.address.rstrip('/')}/{entry['name']}"
    download(address, part)
    found = sha256(part)
    if found != entry["sha256"]:
      part.unlink()
      raise UserError(
        f"{address} is not what the manifest says: its sha256 is {found[:12]} "
        f"instead of {entry['sha256'][:12]}; run `jaxgpt data` again"
      )
    part.replace(path)


def _has_size(path: pathlib.Path, entry: Mapping[str, Any]) -> bool:
  return path.is_file() and path.stat().st_size == entry["size"]


def download(address: str, path: pathlib.Path) -> None:
  """Copies a remote file to a local path.

  Raises:
    UserError: The remote file cannot be read.
    OSError: The local file cannot be written.
  """
  filesystem, inside = files.filesystem_of(address)
  with path.open("wb") as out:
    with named_errors(address, "read"):
      stream = filesystem.open(inside, "rb", block_size=1 << 23)
    with stream:
      while True:
        with named_errors(address, "read"):
          data = stream.read(1 << 23)
        if not data:
          return
        out.write(data)


def names(folder: str) -> list[str]:
  """Names of the entries of a remote folder. Empty if the folder does not exist."""
  filesystem, inside = files.filesystem_of(folder)
  with named_errors(folder, "listed"):
    filesystem.invalidate_cache()
    if not filesystem.exists(inside):
      return []
    return [pathlib.PurePosixPath(path).name for path in filesystem.ls(inside, detail=False)]


def remove(folder: str) -> None:
  """Deletes a remote folder with its content."""
  filesystem, inside = files.filesystem_of(folder)
  with named_errors(folder, "deleted"):
    filesystem.rm(inside, recursive=True)


def upload(folder: pathlib.Path, address: str, last: str | None = None) -> None:
  """Copies a local folder, with everything below it, to a remote folder.

  Readers trust the remote folder only if the file `last` exists. So that one is deleted first and
  written last. In between, a file `UNFINISHED` marks the folder.

  Args:
    folder: The local folder.
    address: Address of the remote folder. Its files with other names stay.
    last: Name of the file that vouches for the others. None: there is none.
  """
  filesystem, inside = files.filesystem_of(address)
  inside = inside.rstrip("/")
  found = sorted(
    (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
    key=lambda name: (name == last, name),
  )
  with named_errors(address, "written"):
    if last:
      filesystem.pipe_file(f"{inside}/{UNFINISHED}", b"being copied\n")
      if filesystem.exists(f"{inside}/{last}"):
        filesystem.rm_file(f"{inside}/{last}")
    for name in found:
      filesystem.put_file(str(folder / name), f"{inside}/{name}")
    if last:
      filesystem.rm_file(f"{inside}/{UNFINISHED}")
