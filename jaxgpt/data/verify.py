"""Whether the files of a prepared folder are those that `jaxgpt data` wrote.

The manifest has the size and SHA-256 of each file, and a digest of itself. A start compares all
sizes, and the content of small files (`check_small`), since reading a large folder takes minutes.
`verify` compares everything.
"""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.storage import buckets
from jaxgpt.storage.paths import sha256
from jaxgpt.text.prepare import shards

CHEAP = 256 << 20  # bytes that a start reads to verify a split


class Verified(NamedTuple):
  """The result of verifying a prepared folder.

  Attributes:
    problems: Lines on files that are not as they were written.
    read: Files whose content was compared.
    unread: Files of which only the size was compared.
    unread_bytes: Their size.
    unknown: Files without a digest in the manifest, which an earlier version wrote.
  """

  problems: list[str]
  read: int
  unread: int = 0
  unread_bytes: int = 0
  unknown: Sequence[str] = ()


def verify(folder: epath.PathLike, most_bytes: int | None = None) -> Verified:
  """Compares the files of a prepared folder with its manifest.

  Args:
    folder: The prepared folder, local or in a bucket.
    most_bytes: Bytes to read. The smallest files come first. None: all.

  Raises:
    UserError: There is no prepared folder, or its manifest is damaged.
  """
  manifest = shards.read_manifest(folder)
  files = [file for entry in manifest["splits"].values() for file in files_of(entry)]
  found, read, unread, unread_bytes = list[str](), 0, 0, 0
  budget = most_bytes
  for file in sorted(files, key=lambda file: file["size"]):
    path = epath.Path(folder) / file["name"]
    if problem := _wrong_size(path, file):
      found.append(f"{path} {problem}")
    elif budget is not None and file["size"] > budget:
      unread, unread_bytes = unread + 1, unread_bytes + file["size"]
    else:
      budget = None if budget is None else budget - file["size"]
      read += 1
      if sha256(path) != file["sha256"]:
        found.append(f"{path} is not what `jaxgpt data` wrote: its sha256 differs")
  others = manifest.get("other_digests", {})
  for name, digest in others.get("files", {}).items():
    path = epath.Path(folder) / name
    read += 1
    if not path.is_file():
      found.append(f"{path} is missing")
    elif sha256(path) != digest:
      found.append(f"{path} is not what `jaxgpt data` wrote: its sha256 differs")
  if others and others["remarks"] != shards.remarks_digest(manifest):
    found.append(f"{epath.Path(folder) / shards.MANIFEST}: its remarks were changed")
  unknown = () if others else ("tokenizer/", "card.md", "card.json", "lengths.svg")
  return Verified(found, read, unread, unread_bytes, unknown)


def check_small(folder: epath.PathLike, split: str, manifest: Mapping[str, Any]) -> None:
  """Compares the small files of a split, and the tokenizer, with the manifest.

  Reads up to `CHEAP` bytes, and each file once per process. Files in a bucket are compared when
  they are fetched.

  Args:
    folder: The prepared folder.
    split: The split, whose files have the right sizes.
    manifest: The folder's manifest.

  Raises:
    UserError: A file is not what was written.
  """
  if buckets.is_remote(folder):
    return
  budget = CHEAP
  wanted = {file["name"]: file["sha256"] for file in files_of(manifest["splits"][split])}
  others = manifest.get("other_digests", {}).get("files", {})
  wanted |= {name: sha for name, sha in others.items() if name.startswith("tokenizer/")}
  paths = {name: pathlib.Path(folder, name) for name in wanted}
  sizes = {name: path.stat().st_size if path.is_file() else -1 for name, path in paths.items()}
  for name in sorted(wanted, key=lambda name: (sizes[name], name)):
    budget -= max(sizes[name], 0)
    if budget < 0:
      return
    if sizes[name] < 0 or _sha256_once(paths[name], *_version(paths[name])) != wanted[name]:
      text = (
        "is missing" if sizes[name] < 0 else "is not what the manifest says: its sha256 differs"
      )
      raise UserError(
        f"{paths[name]} {text}: the prepared folder is damaged; run `jaxgpt data` again, or "
        "`jaxgpt data verify` to see all damages"
      )


def files_of(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The shards and sidecars of a split: {'name', 'size', 'sha256'} each."""
  return [*entry["shards"], *entry["sidecars"]]


def _wrong_size(path: epath.Path, file: Mapping[str, Any]) -> str | None:
  if not path.is_file():
    return "is missing"
  size = path.stat().length
  return None if size == file["size"] else f"has {size:,} bytes instead of {file['size']:,}"


def _version(path: pathlib.Path) -> tuple[int, int, int]:
  stat = os.stat(path)
  return stat.st_ino, stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=4096)
def _sha256_once(path: pathlib.Path, inode: int, changed: int, size: int) -> str:
  """`sha256`, once for each version of a file."""
  del inode, changed, size
  return sha256(path)
