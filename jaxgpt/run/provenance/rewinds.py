"""Rewinds of a run: the steps whose batches it left out after a spike of the loss.

A run that goes back to a checkpoint leaves a start in starts.jsonl with all rewinds so far, and
later starts repeat them. A step that is left out takes its batch and changes nothing but the step's
number. So the state after step N follows from the config and the record, and not from the
checkpoints to which the run went back.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

_KEY = "rewinds"


class Rewind(NamedTuple):
  """Steps that a run leaves out.

  Attributes:
    first: Number of the first of them. The first step of a run is 0.
    end: Number of the step after the last one.
    loss: The loss at step `end` - 1, at which the run went back. None: it was not finite.
    limit: What it should have been at most. None: unknown.
  """

  first: int
  end: int
  loss: float | None
  limit: float | None

  def describe(self) -> str:
    """The steps in words: 'step 7' or 'steps 7 to 9'."""
    if self.end == self.first + 1:
      return f"step {self.first}"
    return f"steps {self.first} to {self.end - 1}"


def of(starts: Sequence[Mapping[str, Any]]) -> list[Rewind]:
  """The rewinds of a run.

  Args:
    starts: From `run_folder.read_starts`.
  """
  return [Rewind(**found) for found in (starts[-1].get(_KEY, ()) if starts else ())]


def entry(rewinds: Sequence[Rewind]) -> dict[str, Any]:
  """The entry of a start's record, {} without rewinds."""
  return {_KEY: [found._asdict() for found in rewinds]} if rewinds else {}


def left_out(rewinds: Sequence[Rewind]) -> Collection[int]:
  """The numbers of all steps that are left out."""
  return {step for found in rewinds for step in range(found.first, found.end)}
