"""Errors of disks and networks: which ones may pass, and what they mean to a user.

A launcher starts a run again after trouble that may pass, so the exit code must tell it from a
mistake. A disk may have room again, but a missing permission stays missing.
"""

import errno

from jaxgpt.errors import EXIT_AGAIN, UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PASSING = (
  *_FULL,
  *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ENOLCK, errno.EMFILE, errno.ENFILE),
  *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)


def passing(error: BaseException) -> OSError | None:
  """The trouble of a disk or a network behind an error, if it may pass, or None.

  Args:
    error: Any exception. Its causes count too.
  """
  seen: BaseException | None = error
  while seen is not None:
    if isinstance(seen, (ConnectionError, TimeoutError)):
      return seen
    if isinstance(seen, OSError) and seen.errno in _PASSING:
      return seen
    seen = seen.__cause__
  return None


def exit_code(error: BaseException) -> int:
  """The exit code of a `UserError` for an error: 75 if it may pass, else 2."""
  return 2 if passing(error) is None else EXIT_AGAIN


def user_error(problem: str, error: OSError, way_out: str) -> UserError:
  """The message for an error, with its exit code.

  Args:
    problem: The thing and what failed, such as "PATH can't be written".
    error: The error.
    way_out: The way out if the trouble lasts, such as a missing permission.
  """
  if (cause := passing(error)) is not None:
    room = "make room, then" if cause.errno in _FULL else "this may pass:"
    way_out = f"{room} run the same command again"
  return UserError(f"{problem} ({error.strerror or error}); {way_out}", exit_code(error))
