"""Orbax handlers of the items of a checkpoint, and the folders of saves that failed."""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from jaxgpt.run import checkpoint_meta
from jaxgpt.run.provenance import saved as saved_lib
from jaxgpt.storage import buckets, paths


class ArraysHandler(ocp.StandardCheckpointHandler):
  """Writes a tree of arrays, and can be waited for alone."""

  _writes: Sequence[ocp.future.Future] = ()

  @classmethod
  def typestr(cls) -> str:
    """Its name in a checkpoint: that of its parent, whose files it writes."""
    name: str = ocp.StandardCheckpointHandler.typestr()
    return name

  async def async_save(self, *args: Any, **kwargs: Any) -> list[ocp.future.Future] | None:
    """Starts to write."""
    started: list[ocp.future.Future] | None = await super().async_save(*args, **kwargs)
    self._writes = started or ()
    return started

  @property
  def is_in_use(self) -> bool:
    """Whether the last save had this item."""
    return bool(self._writes)

  def wait(self, seconds: float) -> None:
    """Returns when Orbax has written the last save's arrays or has given up, or after `seconds`."""
    end = time.monotonic() + seconds
    for write in self._writes:
      with contextlib.suppress(Exception):  # Orbax raises the first failure where it is due
        write.result(timeout=max(end - time.monotonic(), 0.0))


class Handlers:
  """The handlers of all items.

  Attributes:
    registry: Orbax's mapping from items to them.
  """

  def __init__(self, **options: Any):
    """Creates one handler for each item, with options of `ocp.StandardCheckpointHandler`."""
    self._arrays = {name: ArraysHandler(**options) for name in saved_lib.ITEMS}
    self.registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name, handler in self._arrays.items():
      self.registry.add(name, ocp.args.StandardSave, handler)
      self.registry.add(name, ocp.args.StandardRestore, handler)
    meta = checkpoint_meta.MetaHandler()
    self.registry.add("meta", checkpoint_meta.MetaSave, meta)
    self.registry.add("meta", checkpoint_meta.MetaRestore, meta)

  def delete_unfinished(self, folder: epath.Path, seconds: float = 60.0) -> None:
    """Deletes the unfinished checkpoints of a folder, while none is being saved.

    Orbax ends a save at the first item that fails, while other items are still being written. So
    this waits for them. A checkpoint that cannot be deleted is left for the next call.

    Args:
      folder: The folder of the checkpoints.
      seconds: Longest time to wait for writes.
    """
    end = time.monotonic() + seconds
    for left in _unfinished(folder):
      if self._have_begun(left):
        for handler in self._arrays.values():
          handler.wait(max(end - time.monotonic(), 0.0))
      paths.remove(left)

  def _have_begun(self, checkpoint: epath.Path) -> bool:
    """Whether the items of the last save are being written there.

    They begin when the folders of all of them exist. If one could not be made, they wait for it
    until a timeout of Orbax.
    """
    if buckets.is_remote(checkpoint):
      return True
    in_use = {name for name, handler in self._arrays.items() if handler.is_in_use}
    try:
      return {item.name.partition(".")[0] for item in checkpoint.iterdir()} >= in_use | {"meta"}
    except OSError:  # a disk that fails may be why this is called
      return False


def _unfinished(folder: epath.Path) -> list[epath.Path]:
  """The folders of checkpoints that were not completed. [] if they cannot be listed."""
  with contextlib.suppress(OSError):
    found = [path for path in folder.iterdir() if path.name.partition(".")[0].isdigit()]
    unfinished = [path for path in found if ocp.path.step.TMP_DIR_SUFFIX in path.name]
    if buckets.is_remote(folder):  # folders there have their final name from the start
      complete = {one.step for one in ocp.path.step.standard_name_format().find_all(folder)}
      unfinished += [p for p in found if p.name.isdigit() and int(p.name) not in complete]
    return unfinished
  return []
