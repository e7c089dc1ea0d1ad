"""Checkpoints in buckets that Orbax cannot write to: saved on this machine, then copied.

  this machine                                  bucket
  CACHE/runs/train/.../steps/STEP/   --push-->  RUN/checkpoints/STEP/
  CACHE/runs/train/.../marks/STEP               RUN/checkpoints/STEP.complete

STEP.complete holds a random string and is written after all files of STEP/. A checkpoint without it
does not count. The local copy is valid if its mark holds the same string.
"""

import contextlib
import pathlib
import secrets
import shutil
import threading
from collections.abc import Callable, Sequence

import jax
from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.storage import buckets, files

_COMPLETE = ".complete"


def is_needed(folder: epath.PathLike) -> bool:
  """Whether Orbax cannot write to a folder directly: it is in a bucket other than gs://."""
  return buckets.is_remote(folder) and files.scheme_of(str(folder)) != "gs"


class Mirror:
  """A folder of checkpoints in a bucket, and the copies of it on this machine.

  Attributes:
    folder: The local folder, with one subfolder per step.
  """

  def __init__(
    self,
    address: epath.PathLike,
    keep: int | None = None,
    keep_every: int = 0,
    read_only: bool = False,
  ):
    """Lists the bucket, and deletes local copies that do not match it.

    Args:
      address: Address of the folder in the bucket.
      keep: See `checkpoints.Checkpoints`.
      keep_every: See `checkpoints.Checkpoints`.
      read_only: See `checkpoints.Checkpoints`.

    Raises:
      UserError: The address cannot be reached, or there are several processes.
    """
    self._address, self._keep, self._keep_every = str(address).rstrip("/"), keep, keep_every
    scheme = files.scheme_of(self._address)
    if jax.process_count() > 1:
      raise UserError(
        f"--workdir={address}: {jax.process_count()} processes can't save one "
        f"checkpoint to {scheme}://; use gs:// or a file system that all of them see"
      )
    self._filesystem, self._inside = files.filesystem_of(self._address)
    parts = self._address.replace("://", "/").split("/")
    here = buckets.cache_folder().joinpath("runs", "read" if read_only else "train", *parts)
    self.folder, self._marks = here / "steps", here / "marks"
    self._thread: threading.Thread | None = None
    self._error: Exception | None = None
    for folder in (self.folder, self._marks):
      folder.mkdir(parents=True, exist_ok=True)
    # The bucket is the truth. Local copies only save downloads.
    self._complete = self._list()
    self.drop_strangers()

  def drop_strangers(self) -> None:
    """Deletes local checkpoints that are not in the bucket: of another run, or never copied."""
    for path in self.folder.iterdir():
      if path.name.isdecimal() and not self._is_here(int(path.name)):
        shutil.rmtree(path)

  def _list(self) -> dict[int, str]:
    """{step: content of STEP.complete} of the checkpoints in the bucket."""
    with buckets.named_errors(self._address, "listed"):
      self._filesystem.invalidate_cache()
      found = self._filesystem.glob(f"{self._inside}/*{_COMPLETE}")
      step_of = lambda path: int(pathlib.PurePosixPath(path).name.removesuffix(_COMPLETE))
      return {step_of(path): self._filesystem.cat_file(path).decode() for path in found}

  def _is_here(self, step: int) -> bool:
    mark = self._marks / str(step)
    return (
      (self.folder / str(step)).is_dir()
      and mark.is_file()
      and (mark.read_text() == self._complete.get(step))
    )

  def steps(self) -> list[int]:
    """Steps of all complete checkpoints in the bucket, in rising order."""
    return sorted(self._complete)

  def fetch(self, step: int) -> None:
    """Copies a checkpoint to this machine, unless a valid copy is here.

    Raises:
      UserError: The bucket cannot be read.
    """
    if self._is_here(step):
      return
    target = self.folder / str(step)
    unfinished = self._marks / f"{step}.part"
    for folder in (target, unfinished):
      shutil.rmtree(folder, ignore_errors=True)
    root = f"{self._inside}/{step}/"
    with buckets.named_errors(f"{self._address}/{step}", "read"):
      names = [path.removeprefix(root) for path in self._filesystem.find(root)]
    for name in names:
      path = unfinished / name
      path.parent.mkdir(parents=True, exist_ok=True)
      buckets.download(f"{self._address}/{step}/{name}", path)
    unfinished.rename(target)
    (self._marks / str(step)).write_text(self._complete[step])

  def push(self, step: int, wait: Callable[[], None]) -> None:
    """Copies a checkpoint to the bucket in the background, then deletes old ones there.

    Args:
      step: Step of the checkpoint.
      wait: Returns when the local copy is complete.
    """

    def run() -> None:
      try:
        wait()
        self._push(step)
        self._delete_old()
      except Exception as e:  # raised again by `wait`
        self._error = e

    self._thread = threading.Thread(target=run)
    self._thread.start()

  def _push(self, step: int) -> None:
    # A new random mark tells this checkpoint from one of the same step of an earlier run.
    mark = secrets.token_hex(16)
    buckets.upload(self.folder / str(step), f"{self._address}/{step}")
    with buckets.named_errors(self._address, "written"):
      self._filesystem.pipe_file(f"{self._inside}/{step}{_COMPLETE}", mark.encode())
    (self._marks / str(step)).write_text(mark)
    self._complete = self._complete | {step: mark}

  def _delete_old(self) -> None:
    # The mark goes first: from then on the checkpoint does not count, and a kill does no harm.
    for step in old_steps(self.steps(), self._keep, self._keep_every):
      self.delete(step)

  def delete(self, step: int) -> None:
    """Deletes a checkpoint in the bucket.

    Raises:
      UserError: The bucket cannot be written.
    """
    with buckets.named_errors(f"{self._address}/{step}", "deleted"):
      self._filesystem.rm_file(f"{self._inside}/{step}{_COMPLETE}")
      with contextlib.suppress(FileNotFoundError):  # an earlier version may have left the mark
        self._filesystem.rm(f"{self._inside}/{step}", recursive=True)
    self._complete = {other: mark for other, mark in self._complete.items() if other != step}

  def is_at_work(self) -> bool:
    """Whether a `push` is going on."""
    return self._thread is not None and self._thread.is_alive()

  def wait(self) -> None:
    """Returns when the last `push` is complete. Raises its error, if it failed."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    error, self._error = self._error, None
    if error is not None:
      raise error


def old_steps(steps: Sequence[int], keep: int | None, keep_every: int) -> list[int]:
  """The steps to delete: neither among the `keep` newest nor multiples of `keep_every`.

  Args:
    steps: Rising steps.
    keep: Number of newest steps to keep. None: all.
    keep_every: 0: no multiples are kept.
  """
  return [step for step in (steps[:-keep] if keep else ()) if not keep_every or step % keep_every]
