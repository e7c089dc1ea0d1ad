"""`jaxgpt plan`: memory and time that a config takes on hardware, from compiling its train step."""

import dataclasses
import math

from jaxgpt.commands import Command
from jaxgpt.config import options
from jaxgpt.config.options import integer, option, overrides, refuse_unused

HERE = "here"  # the topology of this machine
COMPILE, SEARCH, DRAW = "compile", "search", "draw"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
  config: str = option(
    metavar="FILE.py[:ARG]", help="the experiment; overrides follow as --config.KEY=VALUE"
  )
  topology: str = option(
    metavar="NAME",
    selects={HERE: HERE},
    help="v5e-256, v5p-128 (cores), v6e-64x2 (two slices), v5p:4x4x8, h100x8 (a host of 8 GPUs), "
    "h100x8x2 (two hosts), …, or here (this machine; memory only)",
  )
  save: str | None = option(
    None,
    metavar="FILE",
    modes=(COMPILE, HERE),
    help="write the compiled step to a file for --config.mesh.compiled_step=FILE",
  )
  price: float | None = option(
    None,
    least=0,
    below=math.inf,
    modes=(COMPILE,),
    help="price of a chip-hour, in any currency",
  )
  json: str | None = option(
    None, metavar="FILE", modes=(COMPILE, SEARCH), help="write all figures to a file"
  )
  golden: str | None = option(
    None,
    metavar="FILE",
    modes=(COMPILE,),
    help="compare the collectives with the budget in a file",
  )
  write_golden: str | None = option(
    None,
    metavar="FILE",
    modes=(COMPILE,),
    help="write the collectives to a file, as a budget for --golden",
  )
  top: int = integer(0, modes=(COMPILE,), help="number of the most expensive instructions to print")
  shardings: bool = option(
    False,
    modes=(DRAW,),
    selects={True: DRAW},
    help="draw the sharding of parameters and activations over the mesh; compile nothing",
  )
  search: bool = option(
    False,
    modes=(SEARCH,),
    selects={True: SEARCH},
    help="search for the fastest mesh, batch size per device and remat policy",
  )
  finalists: int | None = integer(
    None, least=1, modes=(SEARCH,), unset="6", help="plans that a search compiles"
  )
  keep_batch: bool = option(
    False, modes=(SEARCH,), help="search with data.batch_size as it is, by gradient accumulation"
  )
  offload: bool = option(
    False,
    modes=(SEARCH,),
    help="also try plans that move saved activations to the host, so that more rows fit",
  )
  hlo: str | None = option(
    None, metavar="FILE", modes=(COMPILE, HERE), help="write the compiled program as text to a file"
  )
  overrides: tuple[str, ...] = overrides()

  @property
  def mode(self) -> str:
    """What the command does: COMPILE, SEARCH, DRAW or HERE."""
    if self.shardings:
      return DRAW
    if self.topology == HERE:
      return HERE
    return SEARCH if self.search else COMPILE

  def __post_init__(self) -> None:
    options.check(self)
    refuse_unused(self, self.mode)


def run(args: PlanOptions) -> int:
  """Prints the plan. Returns 1 if nothing fits or the budget is exceeded, else 0."""
  from jaxgpt.plan import environment

  if args.topology == HERE:
    from jaxgpt.commands.actions import backend

    backend.start()
  else:
    environment.prepare()
  from jaxgpt.commands.actions import plan

  where = args.config, args.overrides, args.topology
  if args.mode == DRAW:
    return plan.draw(*where)
  outputs = plan.Outputs(
    figures=args.json,
    golden=args.golden,
    new_golden=args.write_golden,
    program=args.hlo,
    step=args.save,
  )
  if args.mode == HERE:
    return plan.here(args.config, args.overrides, outputs)
  if args.mode == SEARCH:
    return plan.search(
      *where,
      finalists=args.finalists,
      keep_batch=args.keep_batch,
      offload=args.offload,
      out=args.json,
    )
  return plan.plan(*where, outputs, price=args.price, top=args.top)


COMMAND = Command(
  "plan", "plan a config on TPUs or GPUs that are not there, by compiling it", PlanOptions, run
)
