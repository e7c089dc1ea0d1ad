"""`jaxgpt diff`: how two runs differ."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import option
from jaxgpt.errors import UserError, printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffOptions:
  runs: tuple[str, ...] = option(positional=True, metavar="RUN", help="two run folders")
  json: bool = option(False, help="print one JSON object")


def run(args: DiffOptions) -> None:
  """Prints how configs, environments, data and curves differ."""
  if len(args.runs) != 2:
    raise UserError(f"diff takes two run folders, not {len(args.runs)}: {', '.join(args.runs)}")
  from jaxgpt.analysis import compare_runs
  from jaxgpt.storage import strict_json

  found = compare_runs.compare(*args.runs)
  if args.json:
    parts = {
      "config": [change._asdict() for change in found.config],
      "environment": [fact._asdict() for fact in found.environment],
      "data": found.data,
      "curves": found.curves.to_json(),
      "figures": found.figures,
    }
    print(strict_json.dumps(parts, indent=1))
    return
  print(f"{args.runs[0]} and {args.runs[1]}")
  print(printable("\n".join(compare_runs.lines(found)), keep="\n"))


COMMAND = Command(
  "diff", "show how the configs, environments, data and curves of two runs differ", DiffOptions, run
)
