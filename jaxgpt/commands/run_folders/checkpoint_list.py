"""`jaxgpt checkpoint list`: the checkpoints of a run."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import option
from jaxgpt.errors import printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointListOptions:
  run: str = option(positional=True, metavar="RUN", help="run folder")
  json: bool = option(False, help="print one JSON object")


def run(args: CheckpointListOptions) -> None:
  """Prints a table or a JSON object of all checkpoints."""
  from jaxgpt.analysis import checkpoint_files
  from jaxgpt.run.process import text_table
  from jaxgpt.storage import strict_json

  found = checkpoint_files.listed(args.run)
  if args.json:
    print(strict_json.dumps({"checkpoints": [row._asdict() for row in found]}, indent=1))
    return
  head = ("step", "folder", "size", "complete (UTC)", "items", "note")
  rows = [(e.step, e.folder, text_table.size(e.bytes), e.date, e.items, e.note) for e in found]
  for line in text_table.lines(head, rows, left=len(head)) if rows else ["no checkpoint"]:
    print(printable(line))


COMMAND = Command("checkpoint list", "list the checkpoints of a run", CheckpointListOptions, run)
