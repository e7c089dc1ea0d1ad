"""glibc's allocator: whether freed memory goes back to the system or stays with the process.

Tokenizing text and training on a CPU need opposite settings. All of them do nothing without glibc.
"""

import ctypes
from collections.abc import Callable

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_SMALLEST_MAPPED = 1 << 20  # bytes; for smaller blocks the page faults cost more than they save


def give_back() -> None:
  """Returns large blocks to the system as soon as they are freed, from now on in this process.

  By default glibc raises its mmap threshold to the size of the largest freed block, up to 32 MiB,
  and keeps smaller blocks in pieces that soon fit nothing: a process that tokenized 500 MB of text
  grew from 150 to 240 MB with 60 MB in use. A threshold that is set explicitly stays.
  """
  _call("mallopt", _M_MMAP_THRESHOLD, _SMALLEST_MAPPED)


def keep() -> None:
  """Keeps freed memory in the process, in one arena, from now on.

  XLA's CPU backend allocates its temporaries in every step. Mapping their pages again takes a third
  of a small model's step (docs/log.md). The process never shrinks.
  """
  _call("mallopt", _M_ARENA_MAX, 1)
  _call("mallopt", _M_MMAP_MAX, 0)
  _call("mallopt", _M_TRIM_THRESHOLD, 2**31 - 1)


def trim() -> None:
  """Returns all free memory to the system once, small blocks included."""
  _call("malloc_trim", 0)


def _call(name: str, *args: int) -> None:
  try:
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
  except OSError:  # no C library to load by this name
    return
  if function is not None:
    function(*args)
