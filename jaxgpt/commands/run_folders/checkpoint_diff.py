"""`jaxgpt checkpoint diff`: the arrays in which two checkpoints differ."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import integer, option
from jaxgpt.errors import UserError


def _steps(text: str) -> str:
  if not all(part.isdecimal() for part in text.split(",")) or text.count(",") > 1:
    raise ValueError(f"{text!r} is not a step, or two separated by a comma")
  return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointDiffOptions:
  runs: tuple[str, ...] = option(
    positional=True, metavar="RUN", help="run folder; two to compare a checkpoint of each"
  )
  steps: str | None = option(
    None,
    metavar="A[,B]",
    parse=_steps,
    unset="the two newest of a run, or the newest that both runs have",
    help="steps of the two checkpoints",
  )
  most: int = integer(20, help="arrays to show; 0: all")
  json: bool = option(False, help="print one JSON object")


def run(args: CheckpointDiffOptions) -> None:
  """Prints the arrays that differ, the largest relative difference first."""
  if len(args.runs) > 2:
    raise UserError(f"checkpoint diff takes one or two run folders, not {len(args.runs)}")
  from jaxgpt.analysis import checkpoint_files
  from jaxgpt.storage import strict_json

  steps = [int(step) for step in args.steps.split(",")] if args.steps else []
  first, second, changes = checkpoint_files.compare_steps(args.runs, steps)
  if args.json:
    found = {"first": f"{first.path}", "second": f"{second.path}"}
    arrays = [row._asdict() for row in changes]
    print(strict_json.dumps(found | {"arrays": arrays}, indent=1))
    return
  print(f"from {first.path} to {second.path}:")
  lines = checkpoint_files.change_lines(changes, args.most)
  print("\n".join(lines or ["all arrays are identical to the bit"]))


COMMAND = Command(
  "checkpoint diff", "compare the arrays of two checkpoints", CheckpointDiffOptions, run
)
