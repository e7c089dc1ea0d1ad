"""`jaxgpt data inspect`: prints the documents of a training step."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import integer, option
from jaxgpt.errors import printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectOptions:
  workdir: str = option(positional=True, metavar="RUN", help="run folder")
  step: int = integer(help="number of the step; the first is 0")
  row: int | None = integer(None, unset="all rows", help="number of a row of the batch")
  data: str | None = option(None, metavar="DIR", help="the run's data folder, if it was moved")
  chars: int = integer(300, help="characters of each text to show; 0: all")


def run(args: InspectOptions) -> None:
  """Prints the lines of `inspect_data.inspect`."""
  from jaxgpt.commands.actions import inspect_data

  for line in inspect_data.inspect(args.workdir, args.step, args.row, args.data, args.chars):
    print(printable(line, keep="\t"))


COMMAND = Command(
  "data inspect",
  "print the documents of a training step, as the model sees them",
  InspectOptions,
  run,
)
