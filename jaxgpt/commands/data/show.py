"""`jaxgpt data show`: prints rows of a prepared folder."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import integer, option
from jaxgpt.errors import printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowOptions:
  path: str = option(
    positional=True, metavar="DIR", help="prepared folder; several, separated by commas, are mixed"
  )
  split: str = option("train", choices=("train", "validation", "test"), help="split to draw from")
  rows: int = integer(3, least=1, help="rows to show")
  seed: int = integer(0, help="seed of the draw")
  seq_len: int = integer(256, least=1, help="tokens per row")
  chars: int = integer(300, help="characters of each text to show; 0: all")


def run(args: ShowOptions) -> None:
  """Prints the lines of `inspect_data.show`."""
  from jaxgpt.commands.actions import inspect_data

  for line in inspect_data.show(
    args.path, args.split, args.rows, args.seed, args.seq_len, args.chars
  ):
    print(printable(line, keep="\t"))


COMMAND = Command(
  "data show", "print rows of a prepared folder, as a model sees them", ShowOptions, run
)
