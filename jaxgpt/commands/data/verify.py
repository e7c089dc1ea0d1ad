"""`jaxgpt data verify`: whether the files of a prepared folder are those that were written."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import option
from jaxgpt.errors import printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions:
  path: str = option(
    positional=True, metavar="DIR", help="prepared folder; several, separated by commas"
  )
  json: bool = option(False, help="print one JSON object")


def run(args: VerifyOptions) -> int:
  """Prints a line for each damage and for each folder. Returns 2 if there is a damage, else 0."""
  from jaxgpt.data import pipeline, verify
  from jaxgpt.storage import strict_json

  found = {str(folder): verify.verify(folder) for folder in pipeline.folders(args.path)}
  damaged = any(one.problems for one in found.values())
  if args.json:
    folders = {name: one._asdict() for name, one in found.items()}
    print(strict_json.dumps({"ok": not damaged, "folders": folders}, indent=1))
    return 2 if damaged else 0
  for name, one in found.items():
    for problem in one.problems:
      print(printable(f"damaged  {problem}"))
    unknown = f"; no digest of {', '.join(one.unknown)}" if one.unknown else ""
    print(
      printable(
        f"{name}: {one.read} files read, {len(one.problems)} damaged{unknown}"
        + ("; run `jaxgpt data` again" if one.problems else "")
      )
    )
  return 2 if damaged else 0


COMMAND = Command(
  "data verify",
  "read the files of a prepared folder and compare them with its manifest",
  VerifyOptions,
  run,
)
