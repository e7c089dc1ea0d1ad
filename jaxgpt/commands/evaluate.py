"""`jaxgpt evaluate`: loss and bits per byte of a run on held-out text."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import integer, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
  workdir: str = option(help="run folder")
  step: int | None = integer(None, unset="the newest", help="step of the checkpoint")
  split: str = option(
    "validation", choices=("train", "validation", "test"), help="split to evaluate on"
  )
  data: str | None = option(
    None,
    metavar="DIR",
    unset="the run's own",
    help="data folder to evaluate on: the run's own, if it was moved, or any other that was "
    "prepared with the run's tokenizer",
  )
  json: bool = option(False, help="print one JSON object with all metrics and the data's digest")
  batches: int = integer(0, help="batches to evaluate; 0: the whole split")
  batch_size: int | None = integer(None, least=1, unset="the run's", help="rows per batch")


def run(args: EvaluateOptions) -> None:
  """Evaluates and prints one line, or one JSON object."""
  from jaxgpt.commands.actions import backend
  from jaxgpt.inference import load
  from jaxgpt.storage import strict_json
  from jaxgpt.training import evaluation, train_step

  backend.start()
  found = load.load(args.workdir, args.step, "evaluate")
  result = load.evaluate_run(found, args.split, args.batches, args.batch_size, args.data)
  if args.json:
    print(strict_json.dumps({"split": args.split, "step": found.step, **result}, indent=1))
    return
  if note := train_step.ema_note(found.c.optim, found.step):
    print(note)
  where = args.split
  if found.data_digest and result["data_digest"] != found.data_digest:
    where += f" of {args.data} (other data than the run's, digest {result['data_digest'][:12]})"
  print(f"{where} at step {found.step}: {evaluation.describe(result)}")


COMMAND = Command(
  "evaluate", "compute loss and bits per byte of a run on held-out text", EvaluateOptions, run
)
