"""`jaxgpt prune`: removes weights of a run, and writes the smaller model as a new run."""

import dataclasses

from jaxgpt.analysis.compression import methods
from jaxgpt.commands import Command
from jaxgpt.commands.actions import calibration
from jaxgpt.config import options
from jaxgpt.config.options import checkpoint_step, integer, option
from jaxgpt.errors import UserError

_METHODS = (*methods.PRUNING, *methods.STRUCTURED)
_CALIBRATED = tuple(name for name in _METHODS if name in methods.CALIBRATED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneOptions:
  workdir: str = option(help="run folder")
  step: int | str | None = checkpoint_step()
  to: str = option(metavar="DIR", help="run folder to make")
  method: str = option(
    choices=_METHODS,
    selects={name: name for name in _METHODS},
    help="how weights are chosen: the smallest; the smallest times the norm of their input "
    "(Wanda); by the error in the output, which the weights that stay make up for (SparseGPT); or "
    "the parts that are removed whole: layers, key/value heads with their queries, or MLP columns",
  )
  sparsity: str | None = option(
    None,
    metavar="X",
    unset="must be given",
    modes=methods.PRUNING,
    help="share of the weights to remove, such as 0.5, or N:M to keep N of M weights in a row, "
    "such as 2:4",
  )
  remove: int | None = integer(
    None,
    least=1,
    modes=methods.STRUCTURED,
    help="number of layers to remove, or of heads or columns in each layer",
  )
  scope: str | None = option(
    None,
    choices=tuple(dict.fromkeys(s for some in methods.SCOPES.values() for s in some)),
    unset=", ".join(f"{some[0]} for {method}" for method, some in methods.SCOPES.items()),
    modes=tuple(methods.SCOPES),
    help="compare the weights of each output, of each matrix of a layer, or of all layers",
  )
  match: tuple[str, ...] = option(
    (),
    metavar="PATTERN",
    unset="the matrices of the layers",
    modes=methods.PRUNING,
    help="parameters to prune, such as 'layers/mlp/*'",
  )
  data: str | None = calibration.data(_CALIBRATED)
  split: str | None = calibration.split(_CALIBRATED)
  rows: int | None = calibration.rows(_CALIBRATED)

  def __post_init__(self) -> None:
    options.check(self)
    options.refuse_unused(self, self.method)
    if self.method in methods.STRUCTURED and self.remove is None:
      raise UserError(f"--method={self.method} needs --remove: say how many to remove")


def run(args: PruneOptions) -> None:
  """Prunes and prints the result, and how to use the new run."""
  from jaxgpt.analysis.compression import compressed_run, prune
  from jaxgpt.commands.actions import backend

  backend.start()
  text = compressed_run.Calibration(args.data, args.split or "train", args.rows or methods.ROWS)
  held = ""
  if args.remove is not None:
    found = compressed_run.smaller(args.workdir, args.to, args.method, args.remove, text, args.step)
    changes = ", ".join(f"model.{key}={value}" for key, value in found.changes.items())
    print(f"removed {len(found.removed)} {args.method} of {args.workdir}: {changes}")
    if args.method == "layers":
      for name, score in found.scores.items():
        removed = ", removed" if name in found.removed else ""
        print(f"  layer {name}: influence {score:.4f}{removed}")
  else:
    sparsity = compressed_run.sparsity_of(args.sparsity)
    settings = prune.Settings(args.method, sparsity, args.scope, args.match)
    zeros = compressed_run.pruned(
      args.workdir, args.to, settings, text if args.method in _CALIBRATED else None, args.step
    )
    count = sum(size for _, size in zeros.values())
    print(
      f"pruned {args.workdir} by {args.method}: {compressed_run.share(zeros):.1%} of {count:,} "
      f"weights in {len(zeros)} parameters are zero"
    )
    held = "--config.optim.keep_zeros=True "
  print(f"{args.to} is a run; use it with")
  print(f"  jaxgpt evaluate --workdir={args.to}")
  print(
    f"  jaxgpt train --config=configs/finetune.py:{args.to} {held}--config.data.path=DATA "
    "--workdir=NEW"
  )


COMMAND = Command("prune", "remove weights of a run, and write a new run", PruneOptions, run)
