"""`jaxgpt reproduce`: trains a run again and compares the two to the bit."""

import dataclasses
import signal

from jaxgpt.commands import Command
from jaxgpt.config.options import integer, option
from jaxgpt.errors import printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
  run: str = option(positional=True, metavar="RUN", help="run folder")
  out: str = option(metavar="DIR", help="new run folder for the repetition")
  steps: int | None = integer(
    None, least=1, unset="all that the run has done", help="steps to train again"
  )
  data: str | None = option(None, metavar="DIR", help="the run's data folder, if it was moved")
  json: bool = option(False, help="print one JSON object at the end")


def run(args: ReproduceOptions) -> int:
  """Trains, then prints whether the result is identical. Returns 1 if it is not."""
  from jaxgpt.analysis import reproduce
  from jaxgpt.commands.actions import backend
  from jaxgpt.hf.weight_source import WEIGHT_SOURCES
  from jaxgpt.storage import strict_json
  from jaxgpt.tasks.in_training import EVALUATORS

  backend.start()
  found = reproduce.reproduce(args.run, args.out, args.steps, args.data, WEIGHT_SOURCES, EVALUATORS)
  if isinstance(found, signal.Signals):
    print(f"stopped by {found.name}: the same command goes on")
    return 128 + found
  if args.json:
    arrays = found.arrays and {
      "step": found.arrays.step,
      "changes": [change._asdict() for change in found.arrays.changes],
    }
    parts = found._asdict() | {
      "identical": found.is_identical,
      "curves": found.curves.to_json(),
      "arrays": arrays,
      "environment": [fact._asdict() for fact in found.environment],
    }
    print(strict_json.dumps(parts, indent=1))
  else:
    print(printable("\n".join(reproduce.lines(found, args.run)), keep="\n"))
  return 0 if found.is_identical else 1


COMMAND = Command(
  "reproduce",
  "train a run again in a new folder and compare the two to the bit",
  ReproduceOptions,
  run,
)
