"""Going on with another config: which keys may change, and the record of a change.

A run that goes on with `--accept-changes` leaves

  RUN/config.json               the new config
  RUN/config_before_STEP.json   the config of the steps before STEP
  RUN/starts.jsonl              the start at STEP, with `changes` and the digest of its config
  RUN/checkpoints/STEP/meta     the digest of the config that made the checkpoint

The declaration of each key says whether it may change (`Key.if_changed`, `Key.fixed`).
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import ml_collections
from etils import epath

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.run import run_folder
from jaxgpt.tree import PyTree

Changes: TypeAlias = Mapping[str, tuple[Any, Any]]  # {flat key: (old value, new value)}


def find(folder: epath.PathLike, c: ml_collections.ConfigDict) -> Changes:
  """The keys whose values differ from those of the run in a folder, except harmless ones.

  Args:
    folder: A run folder with a run.
    c: A resolved config.

  Raises:
    UserError: One of them cannot change. The message says why, for up to three.
  """
  found = {
    key: (old, new) for key, old, new in config.difference(run_folder.read_config(folder), c)
  }
  fixed = [key for key in found if config.effect_of_change(key) is None]
  if fixed:
    lines = [
      f"{key} was {found[key][0]!r}, is {found[key][1]!r}, but it can't change: "
      f"{config.why_fixed(key)}"
      for key in fixed[:3]
    ]
    more = f"; and {len(fixed) - 3} more keys" if len(fixed) > 3 else ""
    raise UserError(
      f"--accept-changes: {'; '.join(lines)}{more}; give the old values, or choose another "
      "--workdir"
    )
  return found


def check_state(changes: Changes, old: PyTree, new: PyTree) -> None:
  """Raises a UserError if changes alter the state, which is then not that of the checkpoints.

  Args:
    changes: From `find`.
    old: Shapes of the state with the old config, see `train_step.abstract_state`.
    new: With the new one.
  """
  form = lambda state: (
    jax.tree.structure(state),
    [(s.shape, s.dtype) for s in jax.tree.leaves(state)],
  )
  if form(old) != form(new):
    keys = ", ".join(f"{key}={new!r}" for key, (_, new) in changes.items())
    raise UserError(
      f"--accept-changes: {keys}: with that the optimizer keeps other arrays than those in the "
      "checkpoint; give the old values, or choose another --workdir"
    )


def check_length(c: ml_collections.ConfigDict, step: int) -> None:
  """Raises a UserError if a run would end before the step that it has reached."""
  if c.train.steps < step:
    raise UserError(
      f"train.steps={c.train.steps}: the run has done {step} steps; give at least as many"
    )


def describe(changes: Changes, step: int) -> list[str]:
  """Lines on the changes for the user."""
  return [
    f"from step {step} on: {key}={new!r} instead of {old!r} ({config.effect_of_change(key)})"
    for key, (old, new) in changes.items()
  ]
