"""A checkpoint as it is on disk, read without the run's config, model or mesh.

`run.checkpoints` writes it, and says what its items are. Here its arrays are read to the host, so
that a checkpoint can be verified and compared wherever it lies.
"""

import hashlib
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxgpt import tree
from jaxgpt.errors import UserError, first_line
from jaxgpt.run import digests
from jaxgpt.run.provenance import seal
from jaxgpt.storage import buckets, strict_json

ITEMS = ("params", "opt", "ema")  # trees of arrays, saved as one item each
META = "meta/metadata"
_DIGEST = "digest"
_KEYS = ("step", "nonfinite_step", "extra", "digests", _DIGEST)  # of `meta`


class Saved(NamedTuple):
  """A checkpoint of a run.

  Attributes:
    run: The run folder.
    folder: Its folder in there, such as 'checkpoints' or 'damaged'.
    step: Its step.
  """

  run: epath.Path
  folder: str
  step: int

  @property
  def path(self) -> epath.Path:
    """The folder of the checkpoint."""
    return self.run / self.folder / str(self.step)

  def items(self) -> list[str]:
    """The items that are there: 'params', 'opt' or 'ema'."""
    return [name for name in ITEMS if (self.path / name).is_dir()]

  def size(self) -> int:
    """Bytes of its files."""
    return sum(p.stat().st_size for p in pathlib.Path(self.path).rglob("*") if p.is_file())

  def date(self) -> str:
    """When it was complete, in UTC, or '?' if that is not known."""
    try:
      written = json.loads((self.path / "_CHECKPOINT_METADATA").read_text())
      seconds = written["commit_timestamp_nsecs"] / 1e9
    except (OSError, ValueError, KeyError, TypeError):
      return "?"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))

  def meta(self) -> dict[str, Any]:
    """The item `meta`.

    Raises:
      ValueError: It cannot be read, or is not as it was saved. The message says why.
    """
    try:
      found = json.loads((self.path / META).read_text())
    except (OSError, ValueError) as e:
      raise ValueError(f"{META} can't be read ({type(e).__name__}: {first_line(e, 100)})") from e
    if problem := meta_problem(found, self.step):
      raise ValueError(f"{META} {problem}")
    return found

  def arrays(self, item: str) -> dict[str, np.ndarray]:
    """{path: array} of an item, on the host.

    Raises:
      ValueError: It cannot be read. The message says why.
    """
    handler, path = ocp.PyTreeCheckpointHandler(), (self.path / item).absolute()
    try:
      there = handler.metadata(path)
      wanted = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), getattr(there, "tree", there)
      )
      found = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=wanted))
    except Exception as e:  # tensorstore, zarr, JSON and OS errors share no class
      raise ValueError(f"{item} can't be read ({type(e).__name__}: {first_line(e, 160)})") from e
    finally:
      handler.close()
    return {path: np.asarray(x) for path, x in tree.flatten(found).items()}


def all_of(run: epath.PathLike, folder: str = seal.CHECKPOINTS) -> list[Saved]:
  """The checkpoints in a folder of a run, by step.

  Raises:
    UserError: The run is in a bucket.
  """
  if buckets.is_remote(run):
    raise UserError(
      f"{run} is in a bucket; copy the run folder to this machine, then name the copy"
    )
  where = epath.Path(run) / folder
  steps = [p.name for p in where.iterdir() if p.name.isdecimal()] if where.is_dir() else []
  return [Saved(epath.Path(run), folder, step) for step in sorted(map(int, steps))]


def find(run: epath.PathLike, step: int | None = None) -> Saved:
  """The checkpoint of a step.

  Args:
    run: The run folder.
    step: The step. None: the newest.

  Raises:
    UserError: There is none.
  """
  found = {saved.step: saved for saved in all_of(run)}
  if not found:
    raise UserError(f"no checkpoint in {epath.Path(run) / seal.CHECKPOINTS}; train first")
  if step is not None and step not in found:
    there = ", ".join(map(str, found))
    raise UserError(f"--step={step}: {run} has no checkpoint of this step; there are: {there}")
  return found[max(found) if step is None else step]


def problems(saved: Saved) -> list[str]:
  """What is wrong with a checkpoint, by file and by array. Reads all of it.

  Returns:
    Lines such as 'params/layers/attn/q differs from what was saved'. [] if all is as it was saved,
    or if an earlier version saved it without digests and it can be read.
  """
  out = []
  if saved.folder == seal.CHECKPOINTS:
    out += seal.damaged_checkpoint(saved.run, saved.step)
  wanted: dict[str, dict[str, str]] = {}
  try:
    meta = saved.meta()
    wanted = meta.get("digests", {})
  except ValueError as e:
    out.append(str(e))
  for item in sorted({*saved.items(), *wanted}, key=ITEMS.index):
    try:
      arrays = saved.arrays(item)
    except ValueError as e:
      out.append(str(e))
      continue
    if item in wanted:
      found = digests.of(arrays)
      for path in sorted(found.keys() | wanted[item].keys()):
        if path not in found:
          out.append(f"{item}/{path} is missing")
        elif found[path] != wanted[item].get(path):
          out.append(f"{item}/{path} differs from what was saved")
  return out


def was_saved(checkpoint: epath.Path, item: str) -> bool:
  """Whether an item was saved with a checkpoint, as far as its `meta` tells.

  Args:
    checkpoint: The folder of the checkpoint.
    item: 'params', 'opt' or 'ema'.

  Returns:
    True also if `meta` is broken, as no whole checkpoint's is.
  """
  try:
    return item in json.loads((checkpoint / META).read_text()).get("digests", {})
  except (OSError, ValueError, AttributeError, TypeError):
    return True


def array_digests(saved: Saved, item: str) -> dict[str, str]:
  """Digests of the arrays of an item as they are now, see `run.digests`.

  Raises:
    ValueError: They cannot be read.
  """
  return digests.of(saved.arrays(item))


def with_digest(meta: Mapping[str, Any]) -> dict[str, Any]:
  """The item `meta` with a digest of itself."""
  return {**meta, _DIGEST: _digest_of(meta)}


def meta_problem(meta: Mapping[str, Any], step: int) -> str | None:
  """Why the item `meta` is not that of a step as it was saved, or None.

  Args:
    meta: Its content. Without a digest, from an earlier version, little can be said.
    step: The step that the checkpoint's folder names.
  """
  if not isinstance(meta, Mapping) or not {"step", "nonfinite_step"} <= meta.keys():
    return "lacks the step"
  if unknown := sorted(meta.keys() - set(_KEYS)):
    return f"has an unknown entry {unknown[0]!r}"
  rest = {key: value for key, value in meta.items() if key != _DIGEST}
  if _DIGEST in meta and meta[_DIGEST] != _digest_of(rest):
    return "was changed: it does not match its digest"
  if meta["step"] != step:
    return f"is that of step {meta['step']}"
  return None


def _digest_of(meta: Mapping[str, Any]) -> str:
  plain = json.loads(strict_json.dumps(meta))  # as it will be read
  return hashlib.sha256(strict_json.dumps(plain, sort_keys=True).encode()).hexdigest()
