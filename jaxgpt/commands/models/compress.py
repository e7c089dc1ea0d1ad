"""`jaxgpt compress`: makes compressed variants of a run and compares them in one table."""

import dataclasses

from jaxgpt.analysis.compression import methods
from jaxgpt.commands import Command
from jaxgpt.config import options
from jaxgpt.config.options import integer, option
from jaxgpt.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressOptions:
  runs: tuple[str, ...] = option(
    (), positional=True, metavar="RUN", help="run folders to compare; the first is the original"
  )
  to: str | None = option(
    None, metavar="DIR", help="folder for variants of the first run; they are rows of the table too"
  )
  variants: str | None = option(
    None,
    metavar="A,B",
    unset="all that suit the model",
    help="with --to: the variants to make, such as wanda-50,int4-gptq-32",
  )
  rows: int | None = integer(
    None,
    least=1,
    unset=str(methods.ROWS),
    help="with --to: rows of calibration text, from the training split",
  )
  data: str | None = option(
    None, metavar="DIR", unset="the run's data", help="prepared folder with the text"
  )
  split: str = option("validation", help="split of the table's scores")
  batches: int = integer(0, help="batches to evaluate; 0: the whole split")
  tokens: int = integer(128, help="tokens to generate for the speed; 0: no generation")
  report: str | None = option(
    None, metavar="FILE", unset="only printed", help="also write the table as Markdown"
  )

  def __post_init__(self) -> None:
    options.check(self)
    if not self.runs:
      raise UserError("RUN is missing: name the run folders to compare")
    if self.to is None and (self.variants or self.rows):
      flag = "--variants" if self.variants else "--rows"
      raise UserError(f"{flag} needs --to: say where the variants are made, or leave it out")
    if self.to is None and len(self.runs) < 2:
      raise UserError("one RUN alone has nothing to compare with: name others, or give --to")


def run(args: CompressOptions) -> None:
  """Makes the variants, measures all runs and prints the table."""
  import pathlib

  from jaxgpt.analysis.compression import compressed_run, report
  from jaxgpt.commands.actions import backend

  backend.start()
  report.check_runs(args.runs)
  folders = [str(folder) for folder in args.runs]
  if args.to is not None:
    names = [name.strip() for name in args.variants.split(",")] if args.variants else None
    text = compressed_run.Calibration(args.data, "train", args.rows or methods.ROWS)
    made = report.make(folders[0], args.to, names, text, print)
    folders += [str(folder) for folder in made]
  rows, lines = list[report.Row](), list[str]()
  for folder, name in zip(folders, report.names_of(folders), strict=True):
    row = report.measure(folder, name, args.split, args.data, args.tokens, args.batches)
    rows.append(row)
    new = [*([] if lines else report.head(row, args.split)), report.line_of(row, rows[0])]
    print("\n".join(new), flush=True)
    lines += new
  print(f"speeds on {report.device()}; quantized weights are float32 again when a run is loaded")
  if args.report:
    pathlib.Path(args.report).write_text("\n".join(lines) + "\n", encoding="utf-8")


COMMAND = Command(
  "compress", "make compressed variants of a run, and compare them in a table", CompressOptions, run
)
