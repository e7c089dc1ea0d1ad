"""`jaxgpt evaluate`: loss, perplexity, bits per byte and accuracy of a run on held-out text."""

import dataclasses
from typing import Any

from jaxgpt.commands import Command
from jaxgpt.commands.actions.processes import ProcessOptions
from jaxgpt.config import options
from jaxgpt.config.options import Group, checkpoint_step, integer, key_value, option
from jaxgpt.errors import UserError

DATA = Group("text to evaluate on, and how")
HARNESS = Group("tasks of EleutherAI's harness")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ProcessOptions):
  workdir: str = option(help="run folder")
  step: int | str | None = checkpoint_step()
  weights: str | None = option(
    None,
    choices=("ema", "raw"),
    unset="ema if the run keeps one",
    help="the moving average of the weights, or the weights of the step",
  )
  split: str | None = option(
    None,
    choices=("train", "validation", "test"),
    unset="validation",
    group=DATA,
    help="split to evaluate on",
  )
  data: str | None = option(
    None,
    metavar="DIR|FILE",
    unset="the run's own",
    group=DATA,
    help="data to evaluate on: a prepared folder, the run's own, if it was moved, or any other in "
    "the run's tokens; or text files, folders, JSONL, CSV, …, which the run's tokenizer encodes",
  )
  kind: str | None = option(
    None,
    metavar="KIND",
    unset="text, or the labelled kind that the run was trained on",
    group=DATA,
    help="kind of the documents in files that are not prepared, see jaxgpt data",
  )
  fields: tuple[tuple[str, str], ...] = option(
    (),
    flag="field",
    metavar="NAME=COLUMN",
    parse=key_value(),
    group=DATA,
    help="column of files that are not prepared, see jaxgpt data",
  )
  stride: int | None = integer(
    None,
    least=1,
    unset="rows as in training",
    group=DATA,
    help="score each token once in overlapping windows, which give all but a document's first "
    "tokens data.seq_len - N tokens of context or more",
  )
  tables: bool = option(
    False,
    group=DATA,
    help="print tables by source, by position in the context and by length of the document",
  )
  gap: bool = option(
    False,
    group=DATA,
    help="also evaluate as many batches of the run's training split in the same way, and print the "
    "difference",
  )
  contamination: int | None = integer(
    None,
    least=1,
    metavar="WORDS",
    unset="not looked for",
    group=DATA,
    help="also print a table of the documents that share a run of WORDS words with the run's "
    "training data (13 is usual), and of the others",
  )
  json: bool = option(
    False, help="print one JSON object with all metrics, the tables and the data's digest"
  )
  batches: int = integer(0, group=DATA, help="batches to evaluate; 0: the whole split")
  batch_size: int | None = integer(None, least=1, unset="the run's", help="rows per batch")
  tasks: str = option(
    "",
    metavar="A,B",
    group=HARNESS,
    help="evaluate on tasks of lm-eval instead (pip install 'jaxgpt[harness]')",
  )
  include_path: str | None = option(
    None, metavar="DIR", group=HARNESS, help="folder with more tasks, as YAML files"
  )
  limit: int | None = integer(None, least=1, group=HARNESS, unset="all", help="examples per task")
  num_fewshot: int | None = integer(
    None, group=HARNESS, unset="as each task says", help="examples in a prompt"
  )
  chat: bool = option(False, group=HARNESS, help="write prompts in the run's chat template")


def run(args: EvaluateOptions) -> None:
  """Evaluates and prints one line and perhaps tables, or one JSON object."""
  _check(args)
  from jaxgpt.commands.actions import backend
  from jaxgpt.parallel import cluster, distributed

  settings = cluster.find(args.coordinator, args.num_processes, args.process_id)
  backend.start(several=settings is not None)
  with distributed.joined(settings, args.join_timeout):
    lines = _lines_of_tasks(args) if args.tasks else _lines(args)
    if distributed.is_first():
      print("\n".join(lines))


def _check(args: EvaluateOptions) -> None:
  """Refuses options that belong to the other way of evaluating."""
  for o in options.declared(EvaluateOptions):
    if getattr(args, o.name) == o.default:
      continue
    if o.group == DATA and args.tasks:
      raise UserError(f"{o.label} is not for --tasks={args.tasks}; leave it out")
    if o.group == HARNESS and not args.tasks:
      raise UserError(f"{o.label} needs --tasks; leave it out")
  if args.gap and args.split == "train":
    raise UserError("--gap compares with the training split: choose another --split")


def _lines_of_tasks(args: EvaluateOptions) -> list[str]:
  from jaxgpt.commands.actions import progress
  from jaxgpt.inference import load
  from jaxgpt.parallel import distributed
  from jaxgpt.storage import strict_json
  from jaxgpt.tasks import harness

  harness.check()
  found = load.load(args.workdir, args.step, "generate", args.weights)
  names = [name.strip() for name in args.tasks.split(",") if name.strip()]
  with progress.Live("requests", compiles=True, shown=distributed.is_first()) as live:
    results = harness.evaluate(
      found,
      names,
      args.include_path,
      args.limit,
      args.num_fewshot,
      args.chat,
      args.batch_size,
      show=lambda done, total: live.count(done, total, "tasks"),
    )
  if args.json:
    return [strict_json.dumps({"step": found.step, "tasks": results}, indent=1)]
  return harness.table(results)


def _lines(args: EvaluateOptions) -> list[str]:
  from jaxgpt.commands.actions import progress
  from jaxgpt.inference import breakdown, evaluate, load, scoring
  from jaxgpt.parallel import distributed
  from jaxgpt.run import run_folder
  from jaxgpt.storage import strict_json
  from jaxgpt.training import evaluation, train_step

  if args.tables or args.contamination:
    c = run_folder.read_config(args.workdir)
    if not scoring.has_scores(c):
      raise UserError(
        f"--{'tables' if args.tables else 'contamination'}: the predictions of objective.name="
        f"{c.objective.name!r} are not choices that can be scored one by one; leave it out"
      )
  found = load.load(args.workdir, args.step, "evaluate", args.weights)
  source = evaluate.Source(args.data, args.split, args.kind, args.fields)
  with (
    evaluate.opened(found, args.workdir, source, args.batch_size) as data,
    progress.Live("batches", compiles=True, shown=distributed.is_first()) as live,
  ):
    show = lambda done, total: live.count(done, total, "evaluate")
    result, scores = evaluate.evaluate(found, data, args.batches, args.stride, show)
    live.clear()
    tables = scores.tables() if scores and (args.tables or args.json) else {}
    if args.contamination and scores:
      tables["contamination"] = evaluate.by_contamination(found, data, scores, args.contamination)
    if args.gap:
      limit = args.batches or data.batches.steps_per_epoch
      show = lambda done, total: live.count(done, total, "train split")
      result |= evaluate.gap(
        found, args.workdir, result["loss"], limit, args.stride, args.batch_size, show
      )
  if args.json:
    head: dict[str, Any] = {"split": data.where, "step": found.step}
    head |= {} if data.left_out is None else {"left_out": data.left_out}
    return [strict_json.dumps({**head, **result, **({"by": tables} if tables else {})}, indent=1)]
  lines = list(data.notices)
  if args.weights != "raw" and (note := train_step.ema_note(found.c.optim, found.step)):
    lines.append(note)
  where = data.where
  if found.data_digest and result["data_digest"] != found.data_digest and where != args.data:
    where += f" of {args.data} (other data than the run's, digest {result['data_digest'][:12]})"
  lines.append(f"{where} at step {found.step}: {evaluation.describe(result)}")
  if args.gap:
    lines.append(f"train loss {result['train_loss']:.4f}, gap {result['gap']:+.4f}")
  return lines + (["", *breakdown.text(tables)] if tables else [])


COMMAND = Command(
  "evaluate", "compute loss and bits per byte of a run on held-out text", EvaluateOptions, run
)
