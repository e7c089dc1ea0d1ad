"""`jaxgpt replay`: computes one step of a run again."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import integer, option
from jaxgpt.errors import printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayOptions:
  run: str = option(positional=True, metavar="RUN", help="run folder")
  step: int = integer(help="number of the step; the first is 0")
  data: str | None = option(None, metavar="DIR", help="the run's data folder, if it was moved")
  most: int = integer(20, help="documents to show, the largest loss first; 0: all")
  json: bool = option(False, help="print one JSON object")


def run(args: ReplayOptions) -> int:
  """Prints the step's metrics, documents and gradients. Returns 1 if the metrics were others."""
  from jaxgpt.analysis import replay
  from jaxgpt.commands.actions import backend
  from jaxgpt.run.process import text_table
  from jaxgpt.storage import strict_json

  backend.start()
  found = replay.replay(args.run, args.step, args.data)
  if args.json:
    examples = [example._asdict() for example in found.examples]
    unequal = {"examples": examples, "unequal": found.unequal()}
    print(strict_json.dumps(found._asdict() | unequal, indent=1))
    return 1 if found.unequal() else 0
  for line in replay.lines(found, args.run):
    print(line)
  rows = sorted(found.examples, key=lambda e: (-(e.loss if e.loss is not None else 0), e.row))
  shown = rows[: args.most or None]
  cells = [
    (
      e.name,
      e.row,
      f"{e.start}-{e.end}",
      f"{e.predictions:g}",
      "" if e.loss is None else f"{e.loss:.4f}",
    )
    for e in shown
  ]
  print(f"{len(rows)} documents in the batch; losses with the weights before the step, no dropout:")
  head = ("document", "row", "tokens", "predictions", "loss")
  for line in text_table.lines(head, cells):
    print(printable(f"  {line}"))
  if len(shown) < len(rows):
    print(f"  … and {len(rows) - len(shown)} more; --most=0 shows all")
  print("gradient norms before clipping:")
  norms = [(name, f"{norm:.6f}") for name, norm in found.norms.items()]
  for line in text_table.lines(("layer", "norm"), norms):
    print(f"  {line}")
  return 1 if found.unequal() else 0


COMMAND = Command(
  "replay",
  "compute one step of a run again: its loss, documents and gradient norms",
  ReplayOptions,
  run,
)
