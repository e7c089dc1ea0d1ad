"""`jaxgpt goodput`: the wall time of a run by activity."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoodputOptions:
  run: str = option(positional=True, metavar="RUN", help="run folder")
  json: bool = option(False, help="print one JSON object")


def run(args: GoodputOptions) -> None:
  """Prints a table or a JSON object of the parts of a run's wall time."""
  from jaxgpt.analysis.report import goodput
  from jaxgpt.run.process import text_table
  from jaxgpt.storage import strict_json

  found = goodput.of_run(args.run)
  if args.json:
    parts = {part.name: part.seconds for part in found.parts}
    facts = {"seconds": found.seconds, "goodput": found.goodput, "starts": found.starts}
    notes = {"repeated_steps": found.repeated, "notes": found.notes}
    print(strict_json.dumps(facts | {"parts": parts} | notes, indent=1))
    return
  total = found.seconds
  cells = [
    (part.name, f"{part.seconds:,.1f}", f"{part.seconds / total:.1%}", part.meaning)
    for part in found.parts
  ]
  cells.append(
    ("wall time", f"{total:,.1f}", "", f"{found.starts} start{'s' * (found.starts > 1)}")
  )
  for line in text_table.lines(("part", "seconds", "share", "covers"), cells, last_left=True):
    print(line)
  if found.repeated:
    print(f"{found.repeated} steps were repeated after a kill")
  for note in found.notes:
    print(f"note: {note}")


COMMAND = Command("goodput", "show where a run's wall time went", GoodputOptions, run)
