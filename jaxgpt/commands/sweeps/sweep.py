"""`jaxgpt sweep`: trains the runs of a sweep file and compares them."""

import dataclasses
import sys
from typing import Any

from jaxgpt.commands import Command
from jaxgpt.config import options
from jaxgpt.config.options import integer, option, overrides
from jaxgpt.errors import UserError, printable
from jaxgpt.run.process import output, stop_signal

_WORKER = "jaxgpt.commands.actions.sweep_worker"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions:
  config: str = option(
    metavar="FILE.py[:ARG]", help="the sweep; overrides for all runs follow as --config.KEY=VALUE"
  )
  workdir: str = option(metavar="DIR", help="folder of the sweep; each run gets a folder in it")
  workers: int = integer(1, least=1, help="processes that train at the same time")
  x: str = option("", metavar="KEY", unset="the one with the most values", help="key of the plot")
  list: bool = option(False, help="list the runs and train none")
  only_table: bool = option(False, help="write the table of what is there and train nothing")
  index: int | None = integer(
    None, least=0, unset="all", help="train run N alone, from 0 on, such as a SLURM array's task"
  )
  retry_failed: bool = option(False, help="try runs again that failed or diverged")
  overrides: tuple[str, ...] = overrides()

  def __post_init__(self) -> None:
    options.check(self)
    if self.list + self.only_table + (self.index is not None) > 1:
      raise UserError("--list, --only-table and --index exclude each other; give one of them")


def run(args: SweepOptions) -> int:
  """Trains, and prints the table. Returns 1 if a run failed."""
  with output.lasting(), stop_signal.ended_at_once():
    plan = _plan(args)
    output.tell(plan.notes)
    if args.list:
      return _list(plan)
    from jaxgpt.analysis.sweep import schedule

    own = plan.members if args.index is None else plan.members[args.index : args.index + 1]
    schedule.check_runs(own, args.workdir)
  if args.index is not None:
    return _one(plan, args)
  if not args.only_table:
    from jaxgpt.run import run_lock

    with run_lock.RunLock(args.workdir) as lock:
      lock.take()
      plan, stopped = _train(plan, args)
    if stopped:
      output.tell(
        [f"stopped by {stopped.name}; everything is saved: run the same command to go on"]
      )
      return 128 + stopped
  return _finish(plan, args)


def _plan(args: SweepOptions) -> Any:
  """The runs of the sweep, as far as they are known."""
  from jaxgpt.analysis.sweep import definition, members, proposals

  sweep = definition.load(args.config)
  if not sweep.search:
    return members.plan(sweep, args.config, args.overrides)
  if args.index is not None:
    raise UserError("--index trains a run by its number, but a search proposes runs from results")
  return proposals.plan(sweep, args.config, args.overrides, args.workdir)


def _list(plan: Any) -> int:
  for i, member in enumerate(plan.members):
    print(printable(f"{i:>4}  {member.name}  {' '.join(member.overrides)}"))
  if plan.missing:
    print(f"{plan.missing} settings more follow from the results of these")
  return 0


def _train(plan: Any, args: SweepOptions) -> Any:
  """Trains all runs that are left. Returns (all runs, the signal that stopped them or None)."""
  from jaxgpt.analysis.sweep import proposals, schedule, state
  from jaxgpt.analysis.sweep import queue as queue_lib

  states = schedule.read_states(plan, args.workdir)
  if args.retry_failed:
    for member in plan.members:
      if states[member.name].failure:
        state.forget_failure(args.workdir, member)
  settings = len({member.number for member in plan.members})
  seeds = len(plan.sweep.seeds)
  done = sum(states[m.name].value_at(m.steps) is not None for m in plan.members)
  counted = [f"{len(plan.members)} runs: {settings} settings, {seeds} seed{'s' * (seeds > 1)} each"]
  counted += [f"{done} of them are done"] if done else []
  counted += [f"{plan.missing} settings more follow from results"] if plan.missing else []
  output.tell(["; ".join(counted)])
  ended = [0]

  def report(job: queue_lib.Job, how: str) -> None:
    ended[0] += 1
    found = state.read(args.workdir, job.member, plan.sweep.metric).value_at(job.until)
    if how == queue_lib.DONE and found is not None:
      how = f"{plan.sweep.metric} {found:.4f}"
    output.tell([printable(f"{ended[0]:>4}  {job.member.name}  step {job.until}: {how}")])

  worker = [sys.executable, "-m", _WORKER]
  queue = queue_lib.Queue(plan, args.workdir, worker, args.workers, report)
  try:
    more = plan
    while more and not queue.stopped:
      plan = more
      schedule.run(plan, args.workdir, queue)
      if not queue.stopped:
        grow = proposals.grown if plan.sweep.search else lambda *_: None
        more = grow(plan, args.config, args.overrides, args.workdir)
        schedule.check_runs(more.members if more else [], args.workdir)
  finally:
    queue.close()
  return plan, queue.stopped


def _one(plan: Any, args: SweepOptions) -> int:
  """Trains one run, in this process."""
  from jaxgpt.analysis.sweep import members, state
  from jaxgpt.commands.actions import backend, sweep_worker

  number = args.index or 0
  if plan.rungs:
    raise UserError("--index trains a run to its end, but the sweep has halving; leave one out")
  if number >= len(plan.members):
    raise UserError(f"--index={number}: the sweep has runs 0 to {len(plan.members) - 1}")
  member = plan.members[number]
  folder = members.folder_of(args.workdir, member)
  output.tell([f"run {number} of {len(plan.members)}: {folder}"])
  if args.retry_failed:
    state.forget_failure(args.workdir, member)
  backend.start()
  request = {
    "base": plan.base,
    "overrides": member.overrides,
    "folder": str(folder),
    "until": member.steps,
  }
  answer = sweep_worker.train(request)
  end, message = answer["end"], answer.get("message", "")
  if end in (state.DIVERGED, state.BROKEN):
    state.fail(args.workdir, member, state.Failure(end, message))
  elif end == "done":  # it may have failed before
    state.forget_failure(args.workdir, member)
  if end != "done":
    output.tell([printable(f"{member.name}: {end}: {message}")])
  return {"done": 0, "diverged": 0, "stopped": 143, "again": 75}.get(end, 1)


def _finish(plan: Any, args: SweepOptions) -> int:
  """Prints the table, and writes it and the plot into the folder of the sweep."""
  from etils import epath

  from jaxgpt.analysis.sweep import plot, schedule
  from jaxgpt.analysis.sweep import state as state_lib
  from jaxgpt.analysis.sweep import table as table_lib
  from jaxgpt.storage import atomic, strict_json

  table = table_lib.make(plan, schedule.read_states(plan, args.workdir))
  folder = epath.Path(args.workdir)
  lines = table_lib.lines(table)
  output.tell([printable(line) for line in lines])
  for name, failure in table.failures.items():
    output.tell([printable(f"{name} {failure.kind}: {failure.message}")])
  folder.mkdir(parents=True, exist_ok=True)
  atomic.write(folder / "table.txt", "\n".join(lines) + "\n")
  atomic.write(folder / "table.json", strict_json.dumps(table_lib.to_json(table), indent=1) + "\n")
  written = ["table.txt", "table.json"]
  if args.x or table.names:
    try:
      atomic.write(folder / "plot.svg", plot.svg(table, plot.axis_key(table, args.x)))
      written.append("plot.svg")
    except UserError as e:
      if args.x:
        raise
      output.tell([f"no plot: {e}"])
  strangers = _strangers(plan, folder)
  if strangers:
    output.tell([f"not runs of this sweep, so not in the table: {', '.join(strangers)}"])
  if not table.is_complete or plan.missing:
    output.tell(["the sweep is not done: run it without --only-table to go on"])
  output.tell([f"wrote {', '.join(written)} in {args.workdir}"])
  broken = [name for name, f in table.failures.items() if f.kind == state_lib.BROKEN]
  if broken:
    output.tell(
      [f"{len(broken)} runs failed; see {args.workdir}/logs, and --retry-failed tries them again"]
    )
  return 1 if broken else 0


def _strangers(plan: Any, folder: Any) -> list[str]:
  """Folders of runs that this sweep does not have, such as those of an earlier version of it."""
  from jaxgpt.analysis.sweep import members

  runs, known = folder / members.RUNS, {member.name for member in plan.members}
  found = [path.name for path in runs.iterdir()] if runs.is_dir() else []
  return sorted(name for name in found if name not in known)


COMMAND = Command("sweep", "train the runs of a sweep file and compare them", SweepOptions, run)
