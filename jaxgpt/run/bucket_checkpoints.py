"""Checkpoints in buckets that Orbax does not write to: saved on this machine, then copied there."""

import pathlib
import secrets
import shutil
import threading

import jax

from jaxgpt.errors import UserError
from jaxgpt.storage import buckets, files

_WHOLE = ".complete"  # STEP.complete beside the folder STEP is written last; no two hold the same


def is_needed(folder):
  """Whether checkpoints can't be written to a folder itself, see the module's docstring."""
  return buckets.is_remote(folder) and files.scheme_of(str(folder)) != "gs"


class Mirror:
  """A folder of checkpoints in a bucket, and the part of it that is on this machine.

  The bucket is what counts: a checkpoint that is not whole there is none.

  Attributes:
    folder: the local folder, a pathlib.Path: one subfolder a step.
  """

  def __init__(self, address, keep=None, keep_every=0, read_only=False):
    """Args: as of `checkpoint.Checkpoints`; `address` is that of its folder.

    Raises:
      UserError: the address can't be reached, or there are several processes.
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
    self._thread = self._error = None
    for folder in (self.folder, self._marks):
      folder.mkdir(parents=True, exist_ok=True)
    self._whole = self._list()
    for path in self.folder.iterdir():
      if path.name.isdecimal() and not self._is_here(int(path.name)):
        shutil.rmtree(path)  # of another run at this address, or never copied

  def _list(self):
    """{step: what its mark holds} of the checkpoints in the bucket."""
    with buckets.named_errors(self._address, "listed"):
      self._filesystem.invalidate_cache()
      found = self._filesystem.glob(f"{self._inside}/*{_WHOLE}")
      return {
        int(pathlib.PurePosixPath(path).name.removesuffix(_WHOLE)): self._filesystem.cat_file(
          path
        ).decode()
        for path in found
      }

  def _is_here(self, step):
    mark = self._marks / str(step)
    return (
      (self.folder / str(step)).is_dir()
      and mark.is_file()
      and (mark.read_text() == self._whole.get(step))
    )

  def steps(self):
    """Steps of all checkpoints in the bucket that are whole, in rising order."""
    return sorted(self._whole)

  def fetch(self, step):
    """Copies a checkpoint to this machine, unless it is here."""
    if self._is_here(step):
      return
    target = self.folder / str(step)
    part = self._marks / f"{step}.part"
    for folder in (target, part):
      shutil.rmtree(folder, ignore_errors=True)
    root = f"{self._inside}/{step}/"
    with buckets.named_errors(f"{self._address}/{step}", "read"):
      names = [path.removeprefix(root) for path in self._filesystem.find(root)]
    for name in names:
      path = part / name
      path.parent.mkdir(parents=True, exist_ok=True)
      buckets.download(f"{self._address}/{step}/{name}", path)
    part.rename(target)
    (self._marks / str(step)).write_text(self._whole[step])

  def push(self, step, wait):
    """Starts to copy a checkpoint to the bucket, once `wait()` returns, and to delete old ones."""

    def run():
      try:
        wait()
        self._push(step)
        self._delete_old()
      except Exception as e:
        self._error = e

    self._thread = threading.Thread(target=run)
    self._thread.start()

  def _push(self, step):
    mark = secrets.token_hex(16)
    buckets.upload(self.folder / str(step), f"{self._address}/{step}")
    with buckets.named_errors(self._address, "written"):
      self._filesystem.pipe_file(f"{self._inside}/{step}{_WHOLE}", mark.encode())
    (self._marks / str(step)).write_text(mark)
    self._whole = self._whole | {step: mark}

  def _delete_old(self):
    for step in old_steps(self.steps(), self._keep, self._keep_every):
      with buckets.named_errors(f"{self._address}/{step}", "deleted"):
        self._filesystem.rm_file(f"{self._inside}/{step}{_WHOLE}")
        self._filesystem.rm(f"{self._inside}/{step}", recursive=True)
      self._whole = {other: mark for other, mark in self._whole.items() if other != step}

  def wait(self):
    """Returns when what was pushed is in the bucket; raises what went wrong."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    error, self._error = self._error, None
    if error is not None:
      raise error


def old_steps(steps, keep, keep_every):
  """Those of rising `steps` that are neither among the `keep` newest nor multiples of keep_every."""
  return [step for step in (steps[:-keep] if keep else ()) if not keep_every or step % keep_every]
