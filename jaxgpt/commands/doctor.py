"""`jaxgpt doctor`: finds the reasons why a run would fail, before it starts."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import option, overrides
from jaxgpt.errors import UserError
from jaxgpt.storage import strict_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorOptions:
  config: str | None = option(
    None, metavar="FILE.py[:ARG]", help="the experiment; overrides follow as --config.KEY=VALUE"
  )
  workdir: str | None = option(
    None, help="run folder: check that it can be written and that there is room"
  )
  no_step: bool = option(False, help="do not compile and run a training step")
  json: bool = option(False, help="print one JSON object instead of lines")
  overrides: tuple[str, ...] = overrides()

  def __post_init__(self) -> None:
    if self.overrides and not self.config:
      raise UserError(f"{self.overrides[0]} needs --config=FILE.py: add it")


def run(args: DoctorOptions) -> int:
  """Prints one finding per line. Returns 2 if a run would fail, else 0."""
  import ml_collections

  from jaxgpt import config
  from jaxgpt.commands.actions import backend
  from jaxgpt.commands.checks import examine
  from jaxgpt.commands.checks import finding as finding_lib
  from jaxgpt.run import run_folder
  from jaxgpt.training import build

  backend.start()

  def load() -> ml_collections.ConfigDict:
    c, origin = config.load(args.config or "", args.overrides)
    config.resolve(c)
    build.check(c)
    resumed = args.workdir is not None and run_folder.is_run(args.workdir)
    build.check_settings(c, origin, resumed=resumed)
    return c

  findings = []
  for finding in examine.examine(load if args.config else None, args.workdir, not args.no_step):
    findings.append(finding)
    if not args.json:
      print(f"{finding.status:<8} {finding.topic:<9} {finding.text}", flush=True)
  problems = sum(finding.status == finding_lib.PROBLEM for finding in findings)
  if args.json:
    print(
      strict_json.dumps({"ok": not problems, "findings": [f._asdict() for f in findings]}, indent=1)
    )
  elif problems:
    print(f"{problems} problem{'s' if problems > 1 else ''}: a run would fail")
  else:
    print("no problem found")
  return 2 if problems else 0


COMMAND = Command("doctor", "find problems of a run before it starts", DoctorOptions, run)
