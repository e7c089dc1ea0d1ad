"""`jaxgpt coordinate-check`: whether activations keep their size as a model grows."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config import options
from jaxgpt.config.options import integer, option, overrides
from jaxgpt.errors import UserError


def _sizes(text: str) -> str:
  """Checks a list of whole numbers, such as '64,128,256'."""
  if not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
    raise ValueError(f"{text!r} is not a list of whole numbers above 0, such as 64,128,256")
  return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordinateCheckOptions:
  config: str = option(
    metavar="FILE.py[:ARG]", help="the experiment; overrides follow as --config.KEY=VALUE"
  )
  widths: str = option(
    "", metavar="N,N,…", parse=_sizes, help="widths to train, such as 64,128,256,512"
  )
  depths: str = option(
    "", metavar="N,N,…", parse=_sizes, help="numbers of layers to train, in place of widths"
  )
  grow: str = option(
    "num_heads", choices=("num_heads", "head_dim"), help="the size that grows with the width"
  )
  steps: int = integer(4, least=1, help="steps of training at each size")
  seeds: int = integer(8, least=1, help="seeds to average over")
  tolerance: float = option(0.25, above=0, help="largest slope that counts as flat")
  json: bool = option(False, help="print one JSON object")
  overrides: tuple[str, ...] = overrides()

  def __post_init__(self) -> None:
    options.check(self)
    if bool(self.widths) == bool(self.depths):
      raise UserError("coordinate-check needs --widths=N,N,… or --depths=N,N,…, one of the two")


def run(args: CoordinateCheckOptions) -> int:
  """Prints the check. Returns 1 if it does not pass."""
  from jaxgpt import config
  from jaxgpt.analysis import coordinate_check
  from jaxgpt.commands.actions import backend
  from jaxgpt.storage import strict_json

  c, _ = config.load(args.config, args.overrides)
  backend.start()
  over = coordinate_check.WIDTH if args.widths else coordinate_check.DEPTH
  found = coordinate_check.check(
    c,
    [int(part) for part in (args.widths or args.depths).split(",")],
    over,
    steps=args.steps,
    seeds=args.seeds,
    tolerance=args.tolerance,
    grow=args.grow,
  )
  if args.json:
    rows = [row._asdict() for row in found.rows]
    verdict = {"passes": found.passes, "unclear": found.unclear, "rows": rows}
    print(strict_json.dumps(found._asdict() | verdict, indent=1))
  else:
    print("\n".join(coordinate_check.lines(found)))
  return 0 if found.passes else 1


COMMAND = Command(
  "coordinate-check",
  "check that activations keep their size as a model grows, as with muP",
  CoordinateCheckOptions,
  run,
)
