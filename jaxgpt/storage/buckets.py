"""Buckets (s3://, gs://): whole files fetched into a cache on this machine, and folders sent there.

The cache is the folder JAXGPT_CACHE, ~/.cache/jaxgpt where that is not set. Credentials and
endpoints are those of `files`.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib

from jaxgpt.errors import UserError
from jaxgpt.storage import files

UNFINISHED = "unfinished"  # marks a remote folder that is being written


def is_remote(path):
  """Whether a path is an address, such as s3://bucket/folder."""
  return bool(files.scheme_of(os.fspath(path)))


def cache_folder():
  """Where copies of remote files are."""
  return pathlib.Path(os.environ.get("JAXGPT_CACHE") or pathlib.Path.home() / ".cache" / "jaxgpt")


@contextlib.contextmanager
def named_errors(address, verb):
  """Turns what a service's own library raises into a UserError that names the address."""
  try:
    yield
  except UserError:
    raise
  except Exception as e:  # each service has exceptions of its own
    raise files.remote_error(os.fspath(address), e, verb) from e


def check(path, verb="reached"):
  """Raises a UserError where a remote path can't be reached; says nothing of local ones."""
  if is_remote(path):
    filesystem, inside = files.filesystem_of(os.fspath(path))
    with named_errors(path, verb):
      filesystem.exists(inside)


def sizes(folder, names):
  """{name: bytes} of those of `names` that are files in a folder; a bucket is asked once."""
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
  """The files of a prepared folder on this machine: themselves, or copies that are fetched whole
  when they are first asked for. Picklable.

  Attributes:
    folder: the local folder, a pathlib.Path.
  """

  def __init__(self, address, digest):
    """Args: address: of the folder. digest: of its content, which copies are kept by."""
    self.address, self._are_copies = os.fspath(address), is_remote(address)
    self.folder = cache_folder() / "data" / digest if self._are_copies else pathlib.Path(address)

  def get(self, entry):
    """The path of a file, fetched if need be.

    Args:
      entry: its {'name', 'size', 'sha256'} in the manifest, which a fetched copy is checked
        against.

    Raises:
      UserError: it can't be fetched or kept, or it is not what the manifest says.
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
        "there; make room, or set JAXGPT_CACHE to another folder"
      ) from e
    return path

  def _fetch(self, entry, path):
    part = path.with_name(f"{path.name}.part")
    address = f"{self.address.rstrip('/')}/{entry['name']}"
    download(address, part)
    with part.open("rb") as f:
      digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != entry["sha256"]:
      part.unlink()
      raise UserError(
        f"{address} is not what the manifest says: its sha256 is {digest[:12]} "
        f"instead of {entry['sha256'][:12]}; run `jaxgpt data` again"
      )
    part.replace(path)


def _has_size(path, entry):
  return path.is_file() and path.stat().st_size == entry["size"]


def download(address, path):
  """Copies a remote file to a local path; raises OSError only where that can't be written."""
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


def names(folder):
  """Names of what is in a remote folder: none where there is no such folder."""
  filesystem, inside = files.filesystem_of(folder)
  with named_errors(folder, "listed"):
    filesystem.invalidate_cache()
    if not filesystem.exists(inside):
      return []
    return [pathlib.PurePosixPath(path).name for path in filesystem.ls(inside, detail=False)]


def remove(folder):
  """Deletes a remote folder with all in it."""
  filesystem, inside = files.filesystem_of(folder)
  with named_errors(folder, "deleted"):
    filesystem.rm(inside, recursive=True)


def upload(folder, address, last=None):
  """Copies a local folder with all below it, and `last`, the file that vouches for it, last.

  Args:
    folder: a pathlib.Path.
    address: of the remote folder. What it holds of other names stays.
    last: a file's name, deleted there before anything else is written; until it is written, there
      is a file `UNFINISHED` too. None: there is none.
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
