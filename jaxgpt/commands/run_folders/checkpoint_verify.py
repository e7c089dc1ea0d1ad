"""`jaxgpt checkpoint verify`: whether the files of a run are those that it wrote."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import integer, option
from jaxgpt.errors import printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointVerifyOptions:
  run: str = option(positional=True, metavar="RUN", help="run folder")
  step: int | None = integer(
    None, unset="all checkpoints, and the other files of the run", help="step of one checkpoint"
  )
  json: bool = option(False, help="print one JSON object")


def run(args: CheckpointVerifyOptions) -> int:
  """Prints a line for each checkpoint and each damage. Returns 2 if there is a damage, else 0."""
  from jaxgpt.analysis import verify_run
  from jaxgpt.commands.actions import backend
  from jaxgpt.storage import strict_json

  backend.start()
  reports = []
  for report in verify_run.verify(args.run, args.step):
    reports.append(report)
    if not args.json:
      print(printable("\n".join(report.lines()), keep="\n"), flush=True)
  damaged = sum(bool(report.problems) for report in reports)
  if args.json:
    found = [report._asdict() for report in reports]
    print(strict_json.dumps({"ok": not damaged, "parts": found}, indent=1))
  elif damaged:
    print(f"{damaged} of {len(reports)} parts of the run are damaged")
  else:
    print("all as the run wrote it")
  return 2 if damaged else 0


COMMAND = Command(
  "checkpoint verify",
  "read the checkpoints and the other files of a run, and compare them with their digests",
  CheckpointVerifyOptions,
  run,
)
