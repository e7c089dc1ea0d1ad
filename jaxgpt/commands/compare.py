"""`jaxgpt compare`: whether two runs differ on the same examples by more than chance."""

import dataclasses
from typing import Any

from jaxgpt.commands import Command
from jaxgpt.config.options import integer, key_value, option
from jaxgpt.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
  runs: tuple[str, ...] = option(positional=True, metavar="RUN", help="two run folders")
  split: str | None = option(
    None,
    choices=("train", "validation", "test"),
    unset="validation",
    help="split to compare on",
  )
  data: str | None = option(
    None,
    metavar="DIR|FILE",
    unset="each run's own",
    help="data to compare on, as for jaxgpt evaluate",
  )
  kind: str | None = option(
    None,
    metavar="KIND",
    unset="text, or the labelled kind that the runs were trained on",
    help="kind of the documents in files that are not prepared",
  )
  fields: tuple[tuple[str, str], ...] = option(
    (),
    flag="field",
    metavar="NAME=COLUMN",
    parse=key_value(),
    help="column of files that are not prepared",
  )
  task: str = option(
    "",
    metavar="NAME",
    help="compare the metrics of a task, such as sentiment, on the rows of --data",
  )
  tasks: str = option("", metavar="A,B", help="compare on tasks of lm-eval instead")
  include_path: str | None = option(
    None, metavar="DIR", help="folder with more tasks, as YAML files; with --tasks"
  )
  limit: int | None = integer(None, least=2, unset="all", help="examples per task; with --tasks")
  resamples: int = integer(1000, least=100, help="resamples of the examples")
  seed: int = integer(0, help="seed of the resamples")
  batch_size: int | None = integer(None, least=1, unset="each run's", help="rows per batch")
  json: bool = option(False, help="print one JSON object")


def run(args: CompareOptions) -> None:
  """Prints a table or a JSON object of the metrics of both runs and their differences."""
  if len(args.runs) != 2:
    raise UserError(f"compare takes two run folders, not {len(args.runs)}: {', '.join(args.runs)}")
  _check(args)
  from jaxgpt.commands.actions import backend
  from jaxgpt.storage import strict_json
  from jaxgpt.tasks import compare

  backend.start()
  count, found, notices = 0, list[compare.Comparison](), list[str]()
  if args.task:
    found, count, notices = compare.on_task(
      args.runs,
      args.task,
      str(args.data),
      batch_size=args.batch_size or 32,
      resamples=args.resamples,
      seed=args.seed,
    )
  else:
    for task, first, second in _both(args):
      some = compare.compare(first, second, resamples=args.resamples, seed=args.seed)
      found += [one._replace(metric=f"{task}/{one.metric}" if task else one.metric) for one in some]
      count += len(first.sources)
      notices += dict.fromkeys((*first.notices, *second.notices))
  if args.json:
    rows = {one.metric: one._asdict() | {"difference": one.difference._asdict()} for one in found}
    head = {"examples": count, "runs": args.runs} | ({"notices": notices} if notices else {})
    print(strict_json.dumps(head | {"metrics": rows}, indent=1))
    return
  print("".join(f"{line}\n" for line in notices), end="")
  print(f"{count:,} examples; difference: {args.runs[1]} minus {args.runs[0]}")
  print("\n".join(compare.table(found, ("first", "second"))))


def _both(args: CompareOptions) -> list[tuple[str, Any, Any]]:
  """(task or '', examples of the first run, of the second run) of each data set."""
  from jaxgpt.inference import evaluate
  from jaxgpt.tasks import compare, harness

  if not args.tasks:
    source = evaluate.Source(args.data, args.split, args.kind, args.fields)
    one, other = (compare.examples_of(run, source, batch_size=args.batch_size) for run in args.runs)
    return [("", one, other)]
  names = tuple(args.tasks.split(","))
  first, second = (
    harness.examples(run, names, args.include_path, args.limit, args.batch_size)
    for run in args.runs
  )
  return [(task, first[task], second[task]) for task in first]


def _check(args: CompareOptions) -> None:
  """Refuses options that belong to the other way of comparing."""
  of_tasks: dict[str, Any] = {"include-path": args.include_path, "limit": args.limit}
  of_data: dict[str, Any] = {
    "split": args.split,
    "data": args.data,
    "kind": args.kind,
    "field": args.fields,
  }
  if args.task:
    if not args.data:
      raise UserError(f"--task={args.task} needs --data=FILE, rows with answers")
    of_tasks |= {"tasks": args.tasks, "split": args.split, "kind": args.kind, "field": args.fields}
    for flag, value in of_tasks.items():
      if value:
        raise UserError(f"--{flag} is not for --task; leave it out")
    return
  for flag, value in (of_data if args.tasks else of_tasks).items():
    if value:
      needs = "is not for --tasks" if args.tasks else "needs --tasks"
      raise UserError(f"--{flag} {needs}; leave it out")


COMMAND = Command(
  "compare", "test whether two runs differ on the same examples", CompareOptions, run
)
