"""Digests and deletion of what lies at a path."""

import hashlib
import os
import time

from etils import epath

_PAUSE = 0.1  # seconds


def sha256(path: os.PathLike[str]) -> str:
  """The SHA-256 of a file's content, in hex. Reads it in pieces."""
  with epath.Path(path).open("rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def remove(folder: epath.Path, seconds: float = 2.0) -> bool:
  """Deletes a folder into which other threads may still write.

  Args:
    folder: The folder.
    seconds: How long it tries.

  Returns:
    Whether it is gone.
  """
  end = time.monotonic() + seconds
  while folder.exists():
    try:
      folder.rmtree()
    except OSError:
      if time.monotonic() > end:
        return False
      time.sleep(_PAUSE)
  return True
