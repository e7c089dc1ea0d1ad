"""`jaxgpt quantize`: stores the weights of a run in 8 or 4 bits, as a new run."""

import dataclasses

from jaxgpt.analysis.compression import methods
from jaxgpt.commands import Command
from jaxgpt.commands.actions import calibration
from jaxgpt.config import options
from jaxgpt.config.options import checkpoint_step, integer, option
from jaxgpt.errors import UserError

_BITS = {"int8": 8, "int4": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
  workdir: str = option(help="run folder")
  step: int | str | None = checkpoint_step()
  to: str = option(metavar="DIR", help="run folder to make")
  weights: str = option(choices=tuple(_BITS), help="type of the stored weights")
  method: str = option(
    "nearest",
    choices=methods.ROUNDING,
    selects={name: name for name in methods.ROUNDING},
    help="round each weight to nearest; let the weights that follow make up for its error (GPTQ); "
    "or scale inputs with large activations up first (AWQ)",
  )
  group: int | None = integer(
    None,
    least=1,
    unset="all inputs of an output",
    help="inputs that share a scale, such as 32 or 64",
  )
  match: tuple[str, ...] = option(
    (),
    metavar="PATTERN",
    unset="the matrices of the layers",
    help="parameters to quantize, such as 'layers/mlp/*'",
  )
  embeddings: str | None = option(
    None,
    choices=tuple(_BITS),
    unset="float32",
    help="type of embeddings and head, rounded to nearest with a scale for each token",
  )
  activations: str | None = option(
    None,
    choices=("int8",),
    unset="the run's dtype",
    help="type of the activations in matmuls of the layers (model.quantize of the new run; needs "
    "jaxgpt[quant])",
  )
  data: str | None = calibration.data(("gptq", "awq"))
  split: str | None = calibration.split(("gptq", "awq"))
  rows: int | None = calibration.rows(("gptq", "awq"))

  def __post_init__(self) -> None:
    options.check(self)
    options.refuse_unused(self, self.method)
    if self.activations and (self.weights != "int8" or self.group):
      raise UserError(
        "--activations=int8 needs --weights=int8 without --group: its matmuls have one scale for "
        "each output"
      )


def run(args: QuantizeOptions) -> None:
  """Quantizes and prints the sizes."""
  from jaxgpt.analysis.compression import compressed_run, quantize
  from jaxgpt.commands.actions import backend

  backend.start()
  outside = _BITS[args.embeddings] if args.embeddings else 0
  settings = quantize.Settings(
    args.method, _BITS[args.weights], args.group or 0, args.match, outside
  )
  text = compressed_run.Calibration(args.data, args.split or "train", args.rows or methods.ROWS)
  sizes = compressed_run.quantized(
    args.workdir,
    args.to,
    settings,
    text if args.method in methods.CALIBRATED else None,
    bool(args.activations),
    args.step,
  )
  print(
    f"quantized {args.workdir} to {args.weights} ({args.method}): {sizes.stored:,} bytes of "
    f"weights, {sizes.plain / sizes.stored:.1f} times less than in float32\n"
    f"{args.to} is a run; its weights are float32 again when it is loaded; use it with\n"
    f"  jaxgpt evaluate --workdir={args.to}"
  )


COMMAND = Command(
  "quantize", "store the weights of a run in 8 or 4 bits, as a new run", QuantizeOptions, run
)
