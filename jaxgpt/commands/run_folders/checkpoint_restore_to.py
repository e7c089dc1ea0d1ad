"""`jaxgpt checkpoint restore-to`: takes a run back to an earlier step."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import integer, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointRestoreToOptions:
  run: str = option(positional=True, metavar="RUN", help="run folder")
  step: int = integer(help="step of the checkpoint to go back to")


def run(args: CheckpointRestoreToOptions) -> None:
  """Sets later checkpoints and metrics aside, and prints where they are."""
  from jaxgpt.analysis import restore_to

  print("\n".join(restore_to.restore_to(args.run, args.step)))


COMMAND = Command(
  "checkpoint restore-to",
  "take a run back to an earlier checkpoint; later ones and their metrics are set aside",
  CheckpointRestoreToOptions,
  run,
)
