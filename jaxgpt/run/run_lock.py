"""The lock of a run folder: one `train` at a time.

RUN/train.lock holds the pid and the host of the process that has the lock. The lock is flock(2) on
that file. The kernel releases it when the process ends, however it ends, so a lock never outlives
its run. The file stays. On a network file system, the lock holds between hosts if the mount
supports flock.

The time of the file's last change is the run's last sign of life: the process that trains sets it
twice a second, and nothing else does. It tells the next start how long a killed run went on after
its last checkpoint.

A bucket has no locks. There the file is in the cache on this machine (`buckets.cache_folder`), so
two runs on one machine exclude each other, but not two machines.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import socket
import threading
import time
from typing import Any, Self

from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.storage import buckets, os_errors, strict_json

NAME = "train.lock"
_TRIES = 5  # doctor looks at the lock for a moment, and a killed process may be about to go
_SECONDS = 0.1  # between two tries
_BEAT = 0.5  # seconds between two signs of life
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_held: set[int] = set()  # descriptors of the locks that this process holds


def _close_in_child() -> None:
  """In a forked process: closes the locks, which the process would keep after the run's end."""
  while _held:
    os.close(_held.pop())


os.register_at_fork(after_in_child=_close_in_child)


class RunLock:
  """The lock of a run folder. A context manager, which releases it.

  Attributes:
    problem: The reason why the file system gives no lock, or None.
  """

  def __init__(self, folder: epath.PathLike):
    """Args: folder: The run folder, local or in a bucket. Nothing is locked yet."""
    self._folder, self._path = folder, _path(folder)
    self._descriptor: int | None = None
    self._ended = threading.Event()
    self._beating: threading.Thread | None = None
    self.problem: str | None = None

  def take(self, make: bool = True) -> None:
    """Takes the lock, if this object does not have it yet.

    Args:
      make: Make the folder and the file if they do not exist. False: without them there is no run
        to protect, and nothing happens.

    Raises:
      UserError: Another process has it, or the folder cannot be written.
    """
    if self._descriptor is not None or not (make or self._path.exists()):
      return
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as e:
      raise os_errors.user_error(
        f"--workdir={self._folder} can't be written",
        e,
        "choose another folder or change its permissions",
      ) from e
    try:
      self._lock(descriptor)
    except BaseException:
      os.close(descriptor)
      raise
    self._descriptor = descriptor
    _held.add(descriptor)
    me = {"pid": os.getpid(), "host": socket.gethostname()}
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
      times = os.fstat(descriptor)
      os.ftruncate(descriptor, 0)
      os.pwrite(descriptor, (strict_json.dumps(me) + "\n").encode(), 0)
      os.utime(descriptor, ns=(times.st_atime_ns, times.st_mtime_ns))

  def beat(self) -> None:
    """Gives signs of life from now on until the lock is released. See `last_beat`."""
    if self._descriptor is not None and self._beating is None:
      self._beating = threading.Thread(target=self._beat, name="signs of life", daemon=True)
      self._beating.start()

  def _beat(self) -> None:
    while True:
      now = time.time()
      with contextlib.suppress(OSError):
        os.utime(self._path, (now, now))
      if self._ended.wait(_BEAT):
        return

  def _lock(self, descriptor: int) -> None:
    for left in reversed(range(_TRIES)):
      try:
        return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as e:
        if not left:
          raise UserError(
            f"--workdir={self._folder}: {_named(_read(self._path))} is training in this folder; "
            "wait for it, end it, or choose another --workdir"
          ) from e
        time.sleep(_SECONDS)
      except OSError as e:
        if e.errno not in _NO_LOCKS:
          raise
        self.problem = e.strerror or str(e)
        return

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    if self._beating is not None:
      self._ended.set()
      self._beating.join()
    if self._descriptor is not None:
      _held.discard(self._descriptor)
      os.close(self._descriptor)
      self._descriptor = None


def holder(folder: epath.PathLike) -> str | None:
  """The process that trains in a run folder, such as 'process 71 on host a', or None."""
  path = _path(folder)
  try:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
  except OSError:
    return None
  try:
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return _named(_read(path))
  except OSError:
    pass
  finally:
    os.close(descriptor)
  return None


def last_beat(folder: epath.PathLike) -> float | None:
  """The last sign of life of a run's training, in seconds since the epoch, or None."""
  try:
    return _path(folder).stat().st_mtime
  except OSError:
    return None


def _path(folder: epath.PathLike) -> pathlib.Path:
  if not buckets.is_remote(folder):
    return pathlib.Path(os.path.abspath(folder), NAME)
  digest = hashlib.sha256(os.fspath(folder).rstrip("/").encode()).hexdigest()[:32]
  return buckets.cache_folder() / "locks" / digest


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
  except (OSError, ValueError):  # it is about to be written
    return {}


def _named(record: dict[str, Any]) -> str:
  if not record.keys() >= {"pid", "host"}:
    return "another process"
  return f"process {record['pid']} on host {record['host']}"
