"""The item `meta` of a checkpoint, written when the digests of its arrays are known.

Digests take seconds, so they are computed while training goes on. Orbax commits a checkpoint, which
renames its folder, when all of its items are written, and `meta` is one of them:

  training        copy arrays to the host ── step ── step ── step ── step ── step
  thread                                └─ params, opt ───────── written ─┐
  thread                                └─ digests ── gathered ── meta ───┴─ commit

A process that dies before the commit leaves a folder that does not count.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from jaxgpt.parallel import distributed
from jaxgpt.run import digests
from jaxgpt.run.provenance import saved as saved_lib
from jaxgpt.storage import strict_json

Content = Callable[[], dict[str, Any] | None]


def content(
  meta: Mapping[str, Any], copied: Mapping[str, Mapping[str, digests.HostArray]]
) -> Content:
  """A function that computes the item, to be called once in another thread of each process.

  Args:
    meta: The entries besides the digests.
    copied: {item: from `digests.on_host`}.

  Returns:
    A function that returns `meta` with digests of the arrays and of itself. In processes other than
    the first it sends them their part, and returns None.
  """
  gather = distributed.gather_later()

  def computed() -> dict[str, Any] | None:
    parts = gather({name: digests.sums(arrays) for name, arrays in copied.items()})
    if parts is None:
      return None
    found = {
      name: digests.text(arrays, [part[name] for part in parts]) for name, arrays in copied.items()
    }
    return saved_lib.with_digest({**meta, "digests": found})

  return computed


class MetaHandler(ocp.JsonCheckpointHandler):
  """Writes JSON that is computed in the thread that writes it."""

  async def async_save(
    self, directory: epath.Path, item: Any = None, args: "MetaSave | None" = None
  ) -> list[ocp.future.Future]:
    """Starts to compute and to write. `args` must be given."""
    assert args is not None

    async def write() -> None:
      found = args.content()
      if found is not None:
        (directory / "metadata").write_text(strict_json.dumps(found))

    # It waits for the folder, which Orbax makes in the background too.
    return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="meta")]


@ocp.args.register_with_handler(MetaHandler, for_save=True)
@dataclasses.dataclass
class MetaSave(ocp.args.CheckpointArgs):
  """Arguments of a save.

  Attributes:
    content: Returns the JSON value, or None in a process that writes nothing.
  """

  content: Content


@ocp.args.register_with_handler(MetaHandler, for_restore=True)
@dataclasses.dataclass
class MetaRestore(ocp.args.CheckpointArgs):
  """Arguments of a restore."""
