"""Checkpoints of a run: asynchronous, atomic, restored onto any mesh (Orbax).

Orbax writes to folders and to gs:// itself; for other buckets see `mirror`.

A checkpoint holds one item for each part of the state, so that a user of the weights reads the
weights alone, and `meta`: the step and what the loop needs to go on. Parameters that are not trained
never change, and are saved once, in a folder of their own.
"""

import contextlib
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxgpt import tree
from jaxgpt.errors import UserError
from jaxgpt.parallel import distributed
from jaxgpt.run import bucket_checkpoints
from jaxgpt.storage import buckets

_ITEMS = ("params", "opt", "ema")  # trees of arrays, saved as one item each
_SCALARS = ("step", "nonfinite_step")  # saved in `meta`
_CHUNK = 16 << 20  # bytes of an array that are written at a time where memory is short
_FROZEN = "frozen"  # part of the state, and its folder in the run's


class Checkpoints:
  """The checkpoints of one run, in `folder`."""

  def __init__(self, folder, keep=None, keep_every=0, read_only=False, writing_gb=None):
    """Opens the folder, and makes it where there is none.

    Args:
      folder: where the checkpoints are, one subfolder a step.
      keep: how many of the newest are kept; None: all.
      keep_every: checkpoints whose step is a multiple of it are kept too; 0: none.
      read_only: nothing is made or cleaned up, so a run that is being trained can be read.

      writing_gb: GB of arrays that are on their way to the disk at a time, no less than the largest
        has; in chunks and files of their own, so that next to no memory is needed beside the
        arrays. None: all at once, which is faster.

    Raises:
      UserError: read_only, and there is no such folder.
    """
    self.folder = epath.Path(folder)
    if not buckets.is_remote(folder):
      self.folder = self.folder.absolute()
    buckets.check(folder)
    if read_only and not self.folder.exists():
      raise UserError(f"no checkpoint in {self.folder}; train first")
    self._mirror = (
      bucket_checkpoints.Mirror(self.folder, keep, keep_every, read_only)
      if bucket_checkpoints.is_needed(self.folder)
      else None
    )
    self._chunk = None if writing_gb is None else _CHUNK
    limit = {} if writing_gb is None else {"save_concurrent_gb": writing_gb, "use_ocdbt": False}
    handlers = {name: ocp.StandardCheckpointHandler(**limit) for name in _ITEMS}
    self._manager = ocp.CheckpointManager(
      self._mirror.folder if self._mirror else self.folder,
      item_handlers=handlers | {"meta": ocp.JsonCheckpointHandler()},
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        keep_period=keep_every or None,
        read_only=read_only,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
      ),
    )

  def latest(self):
    """The newest complete checkpoint's step, or None."""
    return max(self._steps(), default=None)

  def _steps(self):
    return self._mirror.steps() if self._mirror else self._manager.all_steps()

  def save(self, state, extra=None):
    """Starts to save; training may go on, and may donate `state`, when this returns.

    Args:
      state: as in `train_step`.
      extra: what else the loop wants back; plain JSON values.
    """
    step = int(state["step"])
    with self._named_errors("save"):
      if self._mirror:
        self._mirror.wait()
      if step not in self._steps():
        self._save(step, state, extra or {})

  def _save(self, step, state, extra):
    how = lambda part: jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=self._chunk), part)
    items = {
      name: ocp.args.StandardSave(part, how(part)) for name, part in state.items() if name in _ITEMS
    }
    meta = {name: int(state[name]) for name in _SCALARS} | {"extra": extra}
    self._manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items))
    if self._mirror:
      self._mirror.push(step, self._manager.wait_until_finished)

  def wait(self):
    """Returns when every save that was started is complete."""
    with self._named_errors("save"):
      self._manager.wait_until_finished()
      if self._mirror:
        self._mirror.wait()

  @contextlib.contextmanager
  def _named_errors(self, verb):
    try:
      yield
    except UserError:
      raise
    except (OSError, ValueError) as e:  # tensorstore reports a full disk as a ValueError
      raise UserError(
        f"can't {verb} a checkpoint in {self.folder}: {_first_line(e)}; make room or "
        "change its permissions, then the same command goes on"
      ) from e

  def restore(self, abstract, step=None):
    """Reads a checkpoint, or parts of it, onto the mesh that `abstract` names.

    Args:
      abstract: tree of `ShapeDtypeStruct`s with shardings, see `train_step.abstract_state`; only
        its top-level parts are read.
      step: which checkpoint; None: the newest.

    Returns:
      (state, extra) with the parts of `abstract`.

    Raises:
      UserError: there is none, it can't be read, or it has other parameters than `abstract`.
    """
    step = self.latest() if step is None else step
    if step is None:
      raise UserError(f"no checkpoint in {self.folder}; train first, or point --workdir elsewhere")
    where = self.folder / str(step)
    if step not in self._steps():
      there = ", ".join(str(s) for s in sorted(self._steps())) or "none"
      raise UserError(f"no checkpoint of step {step} in {self.folder}; there are: {there}")
    self._fetch(step)
    items = {
      name: ocp.args.StandardRestore(part) for name, part in abstract.items() if name in _ITEMS
    }
    try:
      self._check_shapes(where, step, items, abstract)
      out = self._manager.restore(
        step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **items)
      )
    except UserError:
      raise
    except Exception as e:  # tensorstore, zarr, JSON and OS errors share no class
      raise UserError(
        f"checkpoint {where} can't be read ({_first_line(e)}); delete that folder "
        "to go on from the one before"
      ) from e
    state = {name: out[name] for name in items}
    for name in _SCALARS:
      if name in abstract:
        value = np.full((), out["meta"][name], np.int32)
        state[name] = jax.device_put(value, abstract[name].sharding)
    return state, out["meta"]["extra"]

  def _fetch(self, step):
    if self._mirror:
      self._mirror.fetch(step)
      self._manager.reload()

  def shapes(self, name, step=None):
    """{path: shape} of a part of a checkpoint, without reading it.

    Args:
      name: 'params', 'ema' or 'opt'.
      step: which checkpoint; None: the newest.

    Raises:
      UserError: there is none, or it has no such part.
    """
    step = self.latest() if step is None else step
    if step is not None:
      self._fetch(step)
    saved = None if step is None else self._manager.item_metadata(step).get(name)
    if saved is None:
      raise UserError(f"no checkpoint with {name!r} in {self.folder}")
    return {path: tuple(leaf.shape) for path, leaf in tree.flatten(dict(saved)).items()}

  def _check_shapes(self, where, step, items, abstract):
    saved = self._manager.item_metadata(step)
    for name in items:
      if saved.get(name) is None:
        raise UserError(
          f"checkpoint {where} has no {name!r}; was the run made with other settings (optim.ema)?"
        )
      have = {jax.tree_util.keystr(p): tuple(m.shape) for p, m in _leaves(saved[name])}
      want = {jax.tree_util.keystr(p): tuple(s.shape) for p, s in _leaves(abstract[name])}
      if name == "params" and have != want:
        key = min(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
        raise UserError(
          f"checkpoint {where}: parameter {key} is {have.get(key, 'missing')}, but "
          f"the config makes it {want.get(key, 'unknown')}"
        )

  def close(self):
    """Waits for what is being saved and lets go of the folder."""
    self.wait()
    self._manager.close()


def save_frozen(run_folder, state):
  """Saves the parameters of a new run that are not trained, where there are any; once."""
  if _FROZEN not in state:
    return
  checkpoints = Checkpoints(epath.Path(run_folder) / _FROZEN)
  if checkpoints.latest() is None:
    checkpoints.save({"step": 0, "nonfinite_step": -1, "params": state[_FROZEN]})
  checkpoints.close()


def load_frozen(run_folder, abstract):
  """{'frozen': parameters} of a run that does not train all of them; else {}.

  Args:
    run_folder: the run's folder.
    abstract: the state's shapes and shardings.

  Raises:
    UserError: they can't be read.
  """
  if _FROZEN not in abstract:
    return {}
  checkpoints = Checkpoints(epath.Path(run_folder) / _FROZEN, read_only=True)
  state, _ = checkpoints.restore({"params": abstract[_FROZEN]})
  checkpoints.close()
  return {_FROZEN: state["params"]}


def frozen_shapes(run_folder):
  """{path: shape} of the parameters that a run does not train; {} where it trains them all."""
  folder = epath.Path(run_folder) / _FROZEN
  if not folder.exists():
    return {}
  checkpoints = Checkpoints(folder, read_only=True)
  shapes = checkpoints.shapes("params")
  checkpoints.close()
  return shapes


def _first_line(e):
  return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"


def _leaves(tree):
  return jax.tree_util.tree_flatten_with_path(tree)[0]


def dump(folder, state, batch, metrics):
  """Writes what is needed to look into one bad step; called by all processes.

  Args:
    folder: made if need be.
    state: the state that the step left behind, see `train_step`.
    batch: {name: array} of the step.
    metrics: plain floats.
  """
  folder = epath.Path(folder)
  if distributed.is_first():
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "batch.npz").open("wb") as f:
      np.savez(f, **batch)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
  checkpoints = Checkpoints(folder / "state")
  checkpoints.save(state)
  checkpoints.close()
