"""Which runs of a sweep train to which step: to the end, or by successive halving.

  step 100    8 settings   compared, the best half goes on
  step 200    4 settings   compared, the best half goes on
  step 400    2 settings   the end

All decisions follow from the metrics in the run folders, so a sweep that is started again decides
the same. A setting goes on, or ends, with all its seeds.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from etils import epath

from jaxgpt.analysis.sweep import state as state_lib
from jaxgpt.analysis.sweep.members import Member, Plan, folder_of
from jaxgpt.analysis.sweep.queue import Job, Queue
from jaxgpt.errors import UserError
from jaxgpt.run import label_names, run_folder, teacher

States = Mapping[str, state_lib.State]  # {name of the run: state}


def read_states(plan: Plan, workdir: epath.PathLike) -> dict[str, state_lib.State]:
  """The states of all runs."""
  metric = plan.sweep.metric
  return {member.name: state_lib.read(workdir, member, metric) for member in plan.members}


def check_runs(members: Sequence[Member], workdir: epath.PathLike) -> None:
  """Refuses runs that were trained with another config than the sweep gives them now.

  The name of a run follows from its setting and its seed. So a folder may hold a run of an earlier
  version of the sweep, with other values that all runs share.

  Raises:
    UserError: It names the first such run, the keys with both values, and the ways out.
  """
  found = {}
  for member in members:
    folder = folder_of(workdir, member)
    if member.config is not None and run_folder.is_run(folder):
      c = label_names.settle(member.config, folder).c
      c = teacher.settle(c, folder=folder).c
      if changes := run_folder.changes(folder, c, {}):
        found[folder] = changes
  if found:
    first, *others = found
    more = f" (and {len(others)} other runs)" if others else ""
    raise UserError(
      f"{first}{more} was trained with another config than this sweep gives it: {found[first]}; "
      "take another --workdir, give the old values, or remove the folder to train it again"
    )


def run(plan: Plan, workdir: epath.PathLike, queue: Queue) -> None:
  """Trains what is left to train. Check `queue.stopped` afterwards."""
  for number in range(len(plan.rungs) + 1):
    states = read_states(plan, workdir)
    queue.run(jobs(plan, states, number))
    if queue.stopped:
      return


def jobs(plan: Plan, states: States, rung: int) -> list[Job]:
  """The runs that have not reached a rung and should. The one after the last is the end."""
  alive = going_on(plan, states)[rung]
  targets = [(member, target(plan, member, rung)) for member in plan.members]
  return [
    Job(member, step)
    for member, step in targets
    if member.number in alive and _is_open(states[member.name], step)
  ]


def target(plan: Plan, member: Member, rung: int) -> int:
  """The step of a rung. The one after the last is the end of the run."""
  return plan.rungs[rung] if rung < len(plan.rungs) else member.steps


def _is_open(state: state_lib.State, step: int) -> bool:
  return state.failure is None and state.value_at(step) is None


def going_on(plan: Plan, states: States) -> list[list[int]]:
  """For each rung, and for the end, the settings that train to it, as far as is known."""
  alive = list(dict.fromkeys(member.number for member in plan.members))
  out = [alive]
  for step in plan.rungs:
    assert plan.sweep.halving is not None
    members = [member for member in plan.members if member.number in alive]
    if not any(_is_open(states[member.name], step) for member in members):
      kept = max(1, math.ceil(len(alive) * plan.sweep.halving.keep))
      alive = sorted(ranked(plan, states, alive, step)[:kept])
    out.append(alive)
  return out


def ranked(plan: Plan, states: States, settings: Sequence[int], step: int) -> list[int]:
  """Settings from the best to the worst at a step. Runs that diverged or failed count as worst."""
  maximize = plan.sweep.maximize

  def rank(number: int) -> tuple[float, int]:
    values = []
    for member in plan.members:
      if member.number == number:
        value = states[member.name].compared_at(step, maximize)
        values.append(state_lib.WORST[maximize] if value is None else value)
    return (-1 if maximize else 1) * statistics.median(values), number

  return sorted(settings, key=rank)
