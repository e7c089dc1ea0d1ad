"""`jaxgpt report`: runs on one HTML page."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import option
from jaxgpt.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
  runs: tuple[str, ...] = option(
    positional=True, metavar="RUN", help="run folders, or folders with run folders"
  )
  out: str = option("report.html", metavar="FILE", help="HTML file to write")
  results: tuple[str, ...] = option(
    (),
    metavar="FILE",
    help="results to show: what jaxgpt evaluate --json or python -m jaxgpt.tasks.scoring --json "
    "printed, or the parity.json of an export",
  )
  title: str | None = option(
    None, metavar="TEXT", unset="the runs' names", help="title of the page"
  )


def run(args: ReportOptions) -> None:
  """Writes the page."""
  from etils import epath

  from jaxgpt.analysis.report import collect, page, results
  from jaxgpt.run.process import text_table
  from jaxgpt.storage import atomic

  tables = [table for path in args.results for table in results.read(path)]
  runs = collect.runs(args.runs)
  text = page.make(runs, tables, args.title or "")
  try:
    atomic.write(epath.Path(args.out), text)
  except OSError as e:
    raise UserError(
      f"--out={args.out} can't be written ({e.strerror or e}); choose another file"
    ) from e
  count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
  print(f"{args.out}: {count}, {text_table.size(len(text.encode()))}; open it in a browser")


COMMAND = Command(
  "report", "write runs as one HTML page: curves, time, data, config", ReportOptions, run
)
