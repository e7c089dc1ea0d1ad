"""Atomic writes: a kill leaves the old file or the new one, never half of one."""

import os

from etils import epath

from jaxgpt.storage import buckets

PART = ".part"  # suffix of a file that is still being written


def write(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file by writing a neighbour and renaming it.

  Args:
    path: A local file, or an object in a bucket, which is always replaced as a whole.
    content: Text (UTF-8) or bytes.

  Raises:
    OSError: The file cannot be written. The old one is unchanged.
  """
  path = epath.Path(path)
  data = content.encode() if isinstance(content, str) else content
  if buckets.is_remote(path):
    path.write_bytes(data)
    return
  part = path.with_name(path.name + PART)
  part.write_bytes(data)
  os.replace(part, path)
