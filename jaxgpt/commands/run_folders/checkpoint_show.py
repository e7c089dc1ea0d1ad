"""`jaxgpt checkpoint show`: the arrays of a checkpoint."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import integer, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointShowOptions:
  run: str = option(positional=True, metavar="RUN", help="run folder")
  step: int | None = integer(None, unset="the newest", help="step of the checkpoint")
  json: bool = option(False, help="print one JSON object")


def run(args: CheckpointShowOptions) -> None:
  """Prints shape, dtype, norm and range of each array."""
  from jaxgpt.analysis import checkpoint_files
  from jaxgpt.run.process import text_table
  from jaxgpt.storage import strict_json

  saved, arrays = checkpoint_files.shown(args.run, args.step)
  if args.json:
    found = {"step": saved.step, "arrays": [row._asdict() for row in arrays]}
    print(strict_json.dumps(found, indent=1))
    return
  print(f"{saved.path}: {text_table.size(saved.size())}, complete {saved.date()} UTC")
  head = ("array", "shape", "dtype", "norm", "least", "greatest", "not finite")
  rows = [
    (
      a.name,
      "x".join(map(str, a.shape)) or "scalar",
      a.dtype,
      f"{a.norm:.4g}",
      f"{a.least:.4g}",
      f"{a.greatest:.4g}",
      a.not_finite or "",
    )
    for a in arrays
  ]
  print("\n".join(text_table.lines(head, rows, left=3)))


COMMAND = Command("checkpoint show", "show the arrays of a checkpoint", CheckpointShowOptions, run)
