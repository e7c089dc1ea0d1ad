"""`jaxgpt evaluate`: loss, perplexity, bits per byte and accuracy of a run on held-out text."""

import dataclasses
from typing import Any

from jaxgpt.commands import Command
from jaxgpt.commands.actions.processes import ProcessOptions
from jaxgpt.config.options import Group, checkpoint_step, integer, key_value, option
from jaxgpt.errors import UserError

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
    help="split to evaluate on",
  )
  data: str | None = option(
    None,
    metavar="DIR|FILE",
    unset="the run's own",
    help="data to evaluate on: a prepared folder, the run's own, if it was moved, or any other in "
    "the run's tokens; or text files, folders, JSONL, CSV, …, which the run's tokenizer encodes",
  )
  kind: str | None = option(
    None,
    metavar="KIND",
    unset="text, or the labelled kind that the run was trained on",
    help="kind of the documents in files that are not prepared, see jaxgpt data",
  )
  fields: tuple[tuple[str, str], ...] = option(
    (),
    flag="field",
    metavar="NAME=COLUMN",
    parse=key_value(),
    help="column of files that are not prepared, see jaxgpt data",
  )
  stride: int | None = integer(
    None,
    least=1,
    unset="rows as in training",
    help="score each token once in overlapping windows, which give all but a document's first "
    "tokens data.seq_len - N tokens of context or more",
  )
  tables: bool = option(
    False, help="print tables by source, by position in the context and by length of the document"
  )
  gap: bool = option(
    False, help="also evaluate as many batches of the training split, and print the difference"
  )
  contamination: int | None = integer(
    None,
    least=1,
    metavar="WORDS",
    unset="not looked for",
    help="also print a table of the documents that share a run of WORDS words with the run's "
    "training data (13 is usual), and of the others",
  )
  json: bool = option(
    False, help="print one JSON object with all metrics, the tables and the data's digest"
  )
  batches: int = integer(0, help="batches to evaluate; 0: the whole split")
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
  of_tasks = {
    "include-path": args.include_path,
    "limit": args.limit,
    "num-fewshot": args.num_fewshot,
    "chat": args.chat,
  }
  of_data = {
    "split": args.split,
    "data": args.data,
    "kind": args.kind,
    "field": args.fields,
    "stride": args.stride,
    "tables": args.tables,
    "gap": args.gap,
    "contamination": args.contamination,
    "batches": args.batches,
  }
  for flag, value in (of_data if args.tasks else of_tasks).items():
    if value not in (None, False, "", (), 0) or (flag == "num-fewshot" and value == 0):
      needs = "is not for --tasks" if args.tasks else "needs --tasks"
      raise UserError(f"--{flag} {needs}; leave it out")


def _lines_of_tasks(args: EvaluateOptions) -> list[str]:
  from jaxgpt.inference import load
  from jaxgpt.storage import strict_json
  from jaxgpt.tasks import harness

  harness.check()
  found = load.load(args.workdir, args.step, "generate", args.weights)
  names = [name.strip() for name in args.tasks.split(",") if name.strip()]
  results = harness.evaluate(
    found, names, args.include_path, args.limit, args.num_fewshot, args.chat, args.batch_size
  )
  if args.json:
    return [strict_json.dumps({"step": found.step, "tasks": results}, indent=1)]
  return harness.table(results)


def _lines(args: EvaluateOptions) -> list[str]:
  from jaxgpt.inference import breakdown, evaluate, load
  from jaxgpt.storage import strict_json
  from jaxgpt.training import evaluation, train_step

  found = load.load(args.workdir, args.step, "evaluate", args.weights)
  source = evaluate.Source(args.data, args.split, args.kind, args.fields)
  with evaluate.opened(found, args.workdir, source, args.batch_size) as data:
    result, scores = evaluate.evaluate(found, data, args.batches, args.stride)
    tables = scores.tables() if scores and (args.tables or args.json) else {}
    if args.contamination and scores:
      tables["contamination"] = evaluate.by_contamination(found, data, scores, args.contamination)
    if args.gap:
      limit = args.batches or data.batches.steps_per_epoch
      result |= evaluate.gap(found, data.c, result["loss"], limit)
  if args.json:
    head: dict[str, Any] = {"split": data.where, "step": found.step}
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
  if (args.tables or args.contamination) and not tables:
    lines.append(
      f"no tables: the predictions of objective.name={found.c.objective.name!r} are not choices "
      "that can be scored one by one"
    )
  return lines + (["", *breakdown.text(tables)] if tables else [])


COMMAND = Command(
  "evaluate", "compute loss and bits per byte of a run on held-out text", EvaluateOptions, run
)
