"""`jaxgpt runs`: a table of the runs below a folder."""

import dataclasses
from typing import Any

from jaxgpt.commands import Command
from jaxgpt.config.options import option
from jaxgpt.errors import printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunsOptions:
  folder: str = option(positional=True, metavar="DIR", help="folder with run folders")
  sort: str = option(
    "run",
    metavar="COLUMN",
    help="run, status, step, loss, validation, bits_per_byte, tokens_per_second, or a config key",
  )
  descending: bool = option(False, help="sort from the largest value to the smallest")
  json: bool = option(False, help="print one JSON object")


def run(args: RunsOptions) -> None:
  """Prints a table or a JSON object of the runs."""
  from jaxgpt.analysis import run_table
  from jaxgpt.run.process import text_table
  from jaxgpt.storage import strict_json

  rows = run_table.table(args.folder, args.sort, args.descending)
  if args.json:
    print(
      strict_json.dumps(
        {"runs": [row._asdict() | {"differs": dict(row.differs)} for row in rows]}, indent=1
      )
    )
    return
  head = ("run", "status", "step", "loss", "valid.", "bits/byte", "tokens/s", "differs in")
  cells = [
    (
      row.run,
      row.status,
      f"{row.step}/{row.steps}",
      _number(row.loss, ".4f"),
      _number(row.validation, ".4f"),
      _number(row.bits_per_byte, ".4f"),
      _number(row.tokens_per_second, ",.0f"),
      " ".join(f"{key}={value}" for key, value in row.differs.items()) or row.note,
    )
    for row in rows
  ]
  for line in text_table.lines(head, cells, left=2, last_left=True):
    print(printable(line))


def _number(value: Any, form: str) -> str:
  return "" if value is None else format(value, form)


COMMAND = Command("runs", "list the runs below a folder with their results", RunsOptions, run)
