"""Checkpoints of a run with Orbax: asynchronous, atomic, restored onto any mesh.

Orbax writes to local folders and to gs:// directly. For other buckets see `bucket_checkpoints`.

A checkpoint has one item per part of the state, so that the weights can be read alone:

  RUN/checkpoints/STEP/params   the trained parameters
                       opt      the optimizer's state
                       ema      the moving average of the parameters, with optim.ema
                       meta     JSON: the step, digests of all arrays, and what the training loop
                                needs to continue
  RUN/damaged/STEP, STEP.txt    a checkpoint that could not be read as it was saved, and why
  RUN/frozen/0/params           parameters that are not trained, saved once as they never change
  RUN/reference/0/params        copies of the trained parameters from before the first step
  RUN/teacher/0/params          the teacher's parameters
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxgpt import tree
from jaxgpt.errors import UserError, first_line
from jaxgpt.model import fixed_models
from jaxgpt.parallel import distributed, peer_watch
from jaxgpt.run import bucket_checkpoints, checkpoint_handlers, checkpoint_meta, digests
from jaxgpt.run.provenance import saved as saved_lib
from jaxgpt.storage import atomic, buckets

_SCALARS = ("step", "nonfinite_step")  # saved in `meta`
_DELETED = ".deleted"  # end of the name of a folder that is being deleted
_CHUNK = 16 << 20  # bytes of an array that are written at a time if memory is short
_FROZEN = "frozen"  # part of the state, and its folder in the run folder
DAMAGED = "damaged"  # folder in the run folder
_TENSORSTORE_ERRNO = re.compile(r"os_error_code='(\d+)'")  # in its messages, after long paths
_LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)  # trouble that does not pass


class DamagedError(UserError):
  """A checkpoint cannot be read, or its arrays are not those that were saved.

  Attributes:
    reason: The message without the way out.
  """

  def __init__(self, reason: str):
    super().__init__(
      f"{reason}; name another one with --step, or delete that folder to continue from the one "
      "before"
    )
    self.reason = reason


class ChangedError(DamagedError):
  """Arrays of a checkpoint differ from their digests. All processes find the same."""


class SaveError(UserError):
  """A checkpoint could not be written. The earlier ones are as they were.

  Its exit code says whether the same command may succeed later: a disk may have room again, but a
  missing permission stays missing.

  Attributes:
    reason: The message without the folder and the way out.
  """

  def __init__(self, folder: epath.Path, error: BaseException):
    if found := _TENSORSTORE_ERRNO.search(str(error)):
      error = OSError(int(found[1]), os.strerror(int(found[1])))
    lasting = getattr(error, "errno", None) in _LASTING or "PERMISSION_DENIED" in str(error)
    super().__init__(
      f"can't save a checkpoint in {folder}: {_summary(error)}; make room or change its "
      "permissions, then run the same command again to continue",
      exit_code=2 if lasting else peer_watch.EXIT_LOST,
    )
    self.reason = _summary(error)


class Checkpoints:
  """The checkpoints in one folder.

  Example:
    >>> checkpoints = Checkpoints(run / "checkpoints", keep=2)
    >>> checkpoints.save(state)
    >>> state, extra = checkpoints.restore(abstract_state)
    >>> checkpoints.close()
  """

  def __init__(
    self,
    folder: epath.PathLike,
    keep: int | None = None,
    keep_every: int = 0,
    read_only: bool = False,
    writing_gb: float | None = None,
  ):
    """Opens the folder, and makes it if it does not exist.

    Args:
      folder: The folder, which has one subfolder per step.
      keep: Number of newest checkpoints to keep. None: all.
      keep_every: Checkpoints whose step is a multiple of this are kept as well. 0: none.
      read_only: Make and delete nothing, so that the run may be training meanwhile.
      writing_gb: Limit on the GB of arrays that are being written at the same time. At least the
        size of the largest array. Arrays are then written in chunks to files of their own, which
        needs almost no memory besides the arrays. None: no limit, which is faster.

    Raises:
      UserError: read_only, and the folder does not exist.
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
    # See `writing_gb`: chunks, and files per array instead of OCDBT's shared ones.
    self._chunk = None if writing_gb is None else _CHUNK
    limit = {"save_concurrent_gb": writing_gb, "use_ocdbt": False}
    self._limit = {} if writing_gb is None else limit
    self._options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      keep_period=keep_every or None,
      read_only=read_only,
      create=not read_only,
      cleanup_tmp_directories=not read_only,
    )
    self._manager = self._open()
    if not read_only and distributed.is_first() and not buckets.is_remote(self._manager.directory):
      for left in self._manager.directory.glob(f"*{_DELETED}"):  # by a deletion that was killed
        left.rmtree()
    self._unsure: int | None = None  # step of a save that is not known to be complete

  def _open(self) -> ocp.CheckpointManager:
    self._handlers = checkpoint_handlers.Handlers(**self._limit)
    return ocp.CheckpointManager(
      self._mirror.folder if self._mirror else self.folder,
      handler_registry=self._handlers.registry,
      options=self._options,
    )

  def latest(self) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    return max(self._steps(), default=None)

  def _steps(self) -> Iterable[int]:
    return self._mirror.steps() if self._mirror else self._manager.all_steps()

  def save(self, state: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> None:
    """Starts to save. When this returns, training may continue and donate `state`.

    Args:
      state: The state of `train_step`. A step that is saved already is not saved again.
      extra: Plain JSON values that `restore` returns.

    Raises:
      SaveError: This checkpoint cannot be written, or the one before it could not.
    """
    step = int(state["step"])
    with self._named_errors():
      if self._mirror:
        self._mirror.wait()
      if step not in self._steps():
        self._unsure = step
        self._save(step, state, extra or {})

  def _save(self, step: int, state: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    save_args = lambda item: jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=self._chunk), item)
    items = {
      name: ocp.args.StandardSave(item, save_args(item))
      for name, item in state.items()
      if name in saved_lib.ITEMS
    }
    # Scalars go to `meta`, so that a reader of the weights needs no array of the optimizer.
    meta: dict[str, Any] = {name: int(state[name]) for name in _SCALARS} | {"extra": extra}
    copied = {name: digests.on_host(state[name]) for name in items}
    content = checkpoint_meta.content(meta, copied)
    save = ocp.args.Composite(meta=checkpoint_meta.MetaSave(content), **items)
    self._manager.save(step, args=save)
    # Orbax saves in the background. The mirror waits for it in a thread of its own.
    if self._mirror:
      self._mirror.push(step, self._manager.wait_until_finished)

  def finished(self) -> int | None:
    """The step of a save that has become complete since the last call, or None. Does not wait.

    Raises:
      SaveError: A save failed in the background.
    """
    if self._unsure is None or self._is_saving():
      return None
    return self.wait()

  def _is_saving(self) -> bool:
    at_work = self._manager.is_saving_in_progress()
    return at_work or (self._mirror is not None and self._mirror.is_at_work())

  def wait(self) -> int | None:
    """Returns when all started saves are complete: the step of the last one, see `finished`.

    Raises:
      SaveError: A save failed.
    """
    with self._named_errors():
      self._manager.wait_until_finished()
      if self._mirror:
        self._mirror.wait()
    step, self._unsure = self._unsure, None
    return step

  def forget_failure(self) -> int | None:
    """Prepares the next save after one that failed, and deletes unfinished checkpoints.

    Returns:
      The step of the save that failed.
    """
    step, self._unsure = self._unsure, None
    with contextlib.suppress(Exception):  # the failure, which the caller knows
      self._manager.close()
    self._handlers.delete_unfinished(self._manager.directory)
    # The next manager would do it in the background, and fail the next save if it can't.
    self._options.cleanup_tmp_directories = False
    if self._mirror:
      self._mirror.drop_strangers()
    self._manager = self._open()
    return step

  @contextlib.contextmanager
  def _named_errors(self) -> Iterator[None]:
    try:
      yield
    except SaveError:
      raise
    # tensorstore reports a full disk as a ValueError, and a bucket's errors are UserErrors
    except (OSError, ValueError) as e:
      raise SaveError(self.folder, e) from e

  def restore(
    self, abstract: Mapping[str, Any], step: int | None = None
  ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint, or items of it, onto the mesh of `abstract`.

    Args:
      abstract: Tree of `ShapeDtypeStruct`s with shardings, see `train_step.abstract_state`. Only
        the items that it has are read.
      step: Step of the checkpoint. None: the newest.

    Returns:
      (state, extra). `state` has the items of `abstract`.

    Raises:
      UserError: There is no such checkpoint, it cannot be read, or its parameters differ from those
        of `abstract`.
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
      name: ocp.args.StandardRestore(item)
      for name, item in abstract.items()
      if name in saved_lib.ITEMS
    }
    # Checked before Orbax does, whose errors do not name the parameter.
    try:
      self._check_shapes(where, step, {name: abstract[name] for name in items})
      out = self._manager.restore(
        step, args=ocp.args.Composite(meta=checkpoint_meta.MetaRestore(), **items)
      )
    except UserError:
      raise
    except Exception as e:  # tensorstore, zarr, JSON and OS errors share no class
      raise DamagedError(f"checkpoint {where} can't be read ({_summary(e)})") from e
    if problem := saved_lib.meta_problem(out["meta"], step):
      raise DamagedError(f"checkpoint {where} is damaged: {saved_lib.META} {problem}")
    _check_digests(where, {name: out[name] for name in items}, out["meta"].get("digests", {}))
    state = {name: out[name] for name in items}
    for name in _SCALARS:
      if name in abstract:
        value = np.full((), out["meta"][name], np.int32)
        state[name] = jax.device_put(value, abstract[name].sharding)
    return state, out["meta"]["extra"]

  def restore_newest(
    self, abstract: Mapping[str, Any]
  ) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Reads the newest checkpoint that is whole, and sets damaged ones aside in RUN/damaged.

    All processes must call it. Checkpoints in a bucket stay where they are, and one that only some
    processes can read ends all.

    Args:
      abstract: See `restore`.

    Returns:
      (state, extra, lines on the checkpoints that were set aside, or []).

    Raises:
      UserError: See `restore`. None is whole: it is about the newest.
    """
    damaged: list[tuple[int, DamagedError]] = []
    for step in sorted(distributed.share(list(self._steps())), reverse=True) or [None]:
      try:
        state, extra = self.restore(abstract, step)
      except DamagedError as e:
        alone = jax.process_count() == 1 or isinstance(e, ChangedError)
        if not alone or self._mirror or buckets.is_remote(self.folder):
          raise
        damaged.append((step, e))
      else:
        lines = [self._set_aside(step, e) for step, e in damaged]
        return state, extra, [*lines, f"goes on from step {step}"] if lines else []
    raise damaged[0][1]

  def _set_aside(self, step: int, why: DamagedError) -> str:
    """Moves a checkpoint to RUN/damaged. Returns a line on it."""
    target = self.folder.parent / DAMAGED / str(step)
    if distributed.is_first():
      target.parent.mkdir(parents=True, exist_ok=True)
      if target.exists():
        target.rmtree()
      (self.folder / str(step)).rename(target)
      atomic.write(_why(self.folder.parent, step), why.reason + "\n")
    distributed.barrier("damaged checkpoint")
    self._manager.reload()
    return f"{why.reason}: it is in {target} now"

  def delete_after(self, step: int) -> None:
    """Deletes the checkpoints of later steps, the newest first. All processes must call it.

    Raises:
      UserError: The bucket cannot be written.
    """
    later = [s for s in sorted(self._steps(), reverse=True) if s > step]
    if distributed.is_first():
      for each in later:
        if self._mirror:
          self._mirror.delete(each)
        here = self._manager.directory / str(each)
        if here.exists() and not buckets.is_remote(self._manager.directory):
          here = here.rename(here.with_name(f"{each}{_DELETED}"))  # all at once
        if here.exists():
          here.rmtree()
    distributed.barrier("checkpoints to delete")
    self._manager.reload()

  def _fetch(self, step: int) -> None:
    """Copies the checkpoint from the bucket, if it is in one."""
    if self._mirror:
      self._mirror.fetch(step)
      self._manager.reload()

  def shapes(self, name: str, step: int | None = None) -> dict[str, tuple[int, ...]]:
    """{path: shape} of an item of a checkpoint, without reading the arrays.

    Args:
      name: 'params', 'ema' or 'opt'.
      step: Step of the checkpoint. None: the newest.

    Raises:
      UserError: There is no such checkpoint or item.
    """
    step = self.latest() if step is None else step
    if step is not None:
      self._fetch(step)
    saved = None if step is None else self._manager.item_metadata(step).get(name)
    if saved is None:
      raise UserError(f"no checkpoint with {name!r} in {self.folder}")
    return {path: tuple(leaf.shape) for path, leaf in tree.flatten(dict(saved)).items()}

  def _check_shapes(self, where: epath.Path, step: int, abstract: Mapping[str, Any]) -> None:
    saved = self._manager.item_metadata(step)
    for name, item in abstract.items():
      if saved.get(name) is None:
        if saved_lib.was_saved(self._manager.directory / str(step), name):
          raise DamagedError(f"checkpoint {where} is damaged: {name} is missing")
        raise UserError(
          f"checkpoint {where} has no {name!r}; was the run made with other settings (optim.ema)?"
        )
      have = {jax.tree_util.keystr(p): tuple(m.shape) for p, m in _leaves(saved[name])}
      want = {jax.tree_util.keystr(p): tuple(s.shape) for p, s in _leaves(item)}
      if name == "params" and have != want:
        key = min(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
        raise UserError(
          f"checkpoint {where}: parameter {key} is {have.get(key, 'missing')}, but "
          f"the config makes it {want.get(key, 'unknown')}"
        )

  def close(self) -> None:
    """Waits for started saves and releases the folder."""
    self.wait()
    self._manager.close()


def complete_steps(folder: epath.PathLike) -> list[int]:
  """Steps of the complete checkpoints in a folder, which need not exist. Writes nothing there."""
  buckets.check(folder)
  if bucket_checkpoints.is_needed(folder):
    return bucket_checkpoints.Mirror(folder, read_only=True).steps()
  found = ocp.path.step.standard_name_format().find_all(epath.Path(folder))
  return sorted(metadata.step for metadata in found)


def why_damaged(run_folder: epath.PathLike, step: int) -> str:
  """Why a checkpoint was set aside in RUN/damaged, or '' if that is not known."""
  path = _why(epath.Path(run_folder), step)
  return path.read_text().strip() if path.exists() else ""


def _why(run_folder: epath.Path, step: int) -> epath.Path:
  return run_folder / DAMAGED / f"{step}.txt"


def save_frozen(run_folder: epath.PathLike, state: Mapping[str, Any]) -> None:
  """Saves the parameters of a new run that never change, if there are any. Once per run."""
  for name, params in _unchanging(state).items():
    checkpoints = Checkpoints(epath.Path(run_folder) / name)
    if checkpoints.latest() is None:
      checkpoints.save({"step": 0, "nonfinite_step": -1, "params": params})
    checkpoints.close()


def load_frozen(run_folder: epath.PathLike, abstract: Mapping[str, Any]) -> dict[str, tree.PyTree]:
  """Reads the parameters that a run does not train, and those of its fixed models.

  Args:
    run_folder: The run folder.
    abstract: Shapes and shardings of the state.

  Returns:
    {'frozen': parameters}, or {} if `abstract` has none.

  Raises:
    UserError: They cannot be read.
  """
  found: dict[str, tree.PyTree] = {}
  for name, params in _unchanging(abstract).items():
    checkpoints = Checkpoints(epath.Path(run_folder) / name, read_only=True)
    try:
      state, _ = checkpoints.restore({"params": params})
    except DamagedError as e:
      raise UserError(f"{e.reason}; it was saved once, at step 0: restore it from a copy") from e
    checkpoints.close()
    found |= {name: state["params"]} if name in fixed_models.NAMES else state["params"]
  return {_FROZEN: found} if found else {}


def _unchanging(state: Mapping[str, Any]) -> dict[str, tree.PyTree]:
  """{folder in the run folder: parameters}: the model's own frozen ones, and each fixed model's."""
  own, fixed = fixed_models.split(state.get(_FROZEN))
  return ({_FROZEN: own} if own else {}) | fixed


def frozen_shapes(run_folder: epath.PathLike) -> dict[str, tuple[int, ...]]:
  """{path: shape} of the parameters that a run does not train. {} if it trains all."""
  folder = epath.Path(run_folder) / _FROZEN
  if not folder.exists():
    return {}
  checkpoints = Checkpoints(folder, read_only=True)
  shapes = checkpoints.shapes("params")
  checkpoints.close()
  return shapes


def _check_digests(
  where: epath.Path, state: Mapping[str, Any], saved: Mapping[str, Mapping[str, str]]
) -> None:
  """Raises a ChangedError that names the first array that is not as it was saved."""
  for name, item in state.items():
    if changed := digests.changed(item, saved.get(name, {})):
      more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
      raise ChangedError(
        f"checkpoint {where} is damaged: {name}/{changed[0]}{more} differs from what was saved"
      )


def _summary(e: BaseException) -> str:
  return f"{'' if isinstance(e, UserError) else f'{type(e).__name__}: '}{first_line(e, 200)}"


def _leaves(item: tree.PyTree) -> list[tuple[tuple[Any, ...], Any]]:
  return jax.tree_util.tree_flatten_with_path(item)[0]
