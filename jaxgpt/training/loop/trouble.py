"""Errors that end a run: whether its state is still good, and what they mean to a user.

An error in the data, a metric or an evaluation leaves the state after the last completed step as it
is, so the loop saves it before the error goes on. Three kinds of errors get a message in terms of
the config, or an exit code that tells a launcher to start again. All others are bugs and keep their
traceback.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxgpt.errors import UserError, first_line
from jaxgpt.parallel import distributed, peer_watch, sharding
from jaxgpt.parallel.chips import GIB
from jaxgpt.run import checkpoints as checkpoints_lib
from jaxgpt.storage import os_errors, strict_json
from jaxgpt.tree import PyTree


class NotFiniteError(UserError):
  """A step whose loss, gradient or weights are not finite. The state is not worth saving."""


class UnwrittenError(UserError):
  """A run is done and saved, but the last lines of its metrics are not on disk."""

  def __init__(self, path: epath.Path, lines: int):
    super().__init__(
      f"the checkpoint is saved, but {lines} lines of {path} could not be written and are lost; "
      "make room and run the same command again: it repeats the evaluation, not the steps",
      exit_code=peer_watch.EXIT_LOST,
    )


@contextlib.contextmanager
def explaining(state: PyTree) -> Iterator[None]:
  """Raises errors of its body in the words of `explained`. `state` as there."""
  try:
    yield
  except Exception as e:
    if (found := explained(e, state)) is None:
      raise
    raise found from e


def explained(error: BaseException, state: PyTree) -> UserError | None:
  """The error as a message for the user, or None for a bug and for what is a message already.

  Args:
    error: The error that ended a run.
    state: Shapes and shardings of the run's state, see `train_step.abstract_state`.
  """
  if isinstance(error, UserError):
    return None
  if is_out_of_memory(error):
    return UserError(
      f"out of memory ({first_line(error, 160)}): the state alone takes "
      f"{sharding.device_bytes(state) / GIB:.2f} GiB on each device. For the activations lower "
      "data.batch_size, raise optim.accumulate or set model.remat='full'; for the state raise "
      "mesh.fsdp on more devices, set optim.first_dtype='bfloat16' or make the model smaller. "
      '"jaxgpt plan" with the same --config lists the largest arrays'
    )
  if (cause := os_errors.passing(error)) is not None:
    return UserError(
      f"{type(cause).__name__}: {first_line(cause, 300)}; this may pass: run the same command "
      "again to continue",
      exit_code=peer_watch.EXIT_LOST,
    )
  return None


def is_out_of_memory(error: BaseException) -> bool:
  """Whether a device or this machine has too little memory."""
  of_device = isinstance(error, jax.errors.JaxRuntimeError) and any(
    words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
  )
  return of_device or isinstance(error, MemoryError)


def dump(
  folder: epath.PathLike,
  state: Mapping[str, Any],
  batch: Mapping[str, np.ndarray],
  metrics: Mapping[str, float],
) -> None:
  """Writes the state, batch and metrics of a bad step for debugging. All processes must call it.

  Args:
    folder: The folder to write, made if needed. What it holds is replaced.
    state: The state of `train_step` after the step.
    batch: The step's batch.
    metrics: Its metrics.
  """
  folder = epath.Path(folder)
  if distributed.is_first():
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = dict(batch)
    with (folder / "batch.npz").open("wb") as f:
      np.savez(f, **arrays)
    (folder / "metrics.json").write_text(strict_json.dumps(metrics, indent=2))
  checkpoints = checkpoints_lib.Checkpoints(folder / "state")
  checkpoints.delete_after(-1)  # of an earlier time that the run came to this step
  checkpoints.save(state)
  checkpoints.close()
