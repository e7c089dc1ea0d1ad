"""How Orbax reads and writes the items of a checkpoint."""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from jaxgpt.run import checkpoint_meta
from jaxgpt.run.provenance import saved as saved_lib
from jaxgpt.storage import paths


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

  def wait(self, seconds: float) -> None:
    """Returns when the last save's arrays are written or have failed, or after `seconds`."""
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
    """Makes them, with options of `ocp.StandardCheckpointHandler`."""
    self._arrays = {name: ArraysHandler(**options) for name in saved_lib.ITEMS}
    self.registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name, handler in self._arrays.items():
      self.registry.add(name, ocp.args.StandardSave, handler)
      self.registry.add(name, ocp.args.StandardRestore, handler)
    meta = checkpoint_meta.MetaHandler()
    self.registry.add("meta", checkpoint_meta.MetaSave, meta)
    self.registry.add("meta", checkpoint_meta.MetaRestore, meta)

  def delete_unfinished(self, folder: epath.Path, step: int | None, seconds: float = 60.0) -> None:
    """Deletes what a save that failed has left, once nothing is written there any more.

    Orbax ends a save at the first item that fails, while the others are still being written.

    Args:
      folder: The folder of the checkpoints.
      step: The step of the save.
      seconds: Longest time to wait for an item. What is left in spite of it is deleted by the next
        start.
    """
    for left in folder.glob(f"{step}.*tmp*"):
      items: list[str] = []
      with contextlib.suppress(OSError):  # a disk that fails is why this is called
        items = [item.name for item in left.iterdir()]
      for name, handler in self._arrays.items():
        if any(item.startswith(name) for item in items):  # else it waits for its folder in vain
          handler.wait(seconds)
      paths.remove(left)
