"""`jaxgpt demo`: trains and samples a small model on Python's standard library."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions:
  dir: str = option("runs/demo", help="folder for the data and the run")


def run(args: DemoOptions) -> int:
  """Runs the demo."""
  from jaxgpt.commands.actions import backend, demo

  backend.start()
  return demo.main(args.dir)


COMMAND = Command(
  "demo", "train and sample a small model on Python's standard library", DemoOptions, run
)
