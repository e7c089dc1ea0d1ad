"""`jaxgpt prune`: removes weights of a run, and writes the smaller model as a new run."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config import options
from jaxgpt.config.options import checkpoint_step, integer, option
from jaxgpt.errors import UserError

_UNSTRUCTURED = ("magnitude", "wanda", "sparsegpt")
_STRUCTURED = ("layers", "heads", "columns")
_CALIBRATED = ("wanda", "sparsegpt", *_STRUCTURED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneOptions:
  workdir: str = option(help="run folder")
  step: int | str | None = checkpoint_step()
  to: str = option(metavar="DIR", help="run folder to make")
  method: str = option(
    choices=(*_UNSTRUCTURED, *_STRUCTURED),
    selects={name: name for name in (*_UNSTRUCTURED, *_STRUCTURED)},
    help="how weights are chosen: the smallest; the smallest times the norm of their input "
    "(Wanda); by the error in the output, which the weights that stay make up for (SparseGPT); or "
    "what is removed whole: layers, key/value heads with their queries, or MLP columns",
  )
  sparsity: str | None = option(
    None,
    metavar="X",
    unset="must be given",
    modes=_UNSTRUCTURED,
    help="share of the weights to remove, such as 0.5, or N:M to keep N of M weights in a row, "
    "such as 2:4",
  )
  remove: int | None = integer(
    None,
    least=1,
    modes=_STRUCTURED,
    help="number of layers to remove, or of heads or columns in each layer",
  )
  scope: str | None = option(
    None,
    choices=("layer", "global"),
    unset="layer",
    modes=("magnitude",),
    help="compare the weights of each matrix of a layer, or of all layers",
  )
  match: tuple[str, ...] = option(
    (),
    metavar="PATTERN",
    unset="the matrices of the layers",
    modes=_UNSTRUCTURED,
    help="parameters to prune, such as 'layers/mlp/*'",
  )
  data: str | None = option(
    None,
    metavar="DIR",
    unset="the run's data",
    modes=_CALIBRATED,
    help="prepared folder with calibration text",
  )
  split: str | None = option(
    None, unset="train", modes=_CALIBRATED, help="split of the calibration text"
  )
  rows: int | None = integer(
    None, least=1, unset="128", modes=_CALIBRATED, help="rows of calibration text"
  )

  def __post_init__(self) -> None:
    options.check(self)
    options.refuse_unused(self, self.method)
    if self.method in _STRUCTURED and self.remove is None:
      raise UserError(f"--method={self.method} needs --remove: say how many to remove")


def run(args: PruneOptions) -> None:
  """Prunes and prints what was removed, and how to use the new run."""
  from jaxgpt.analysis.compression import compressed_run, prune
  from jaxgpt.commands.actions import backend

  backend.start()
  text = compressed_run.Calibration(
    args.data, args.split or "train", args.rows or compressed_run.ROWS
  )
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
    settings = prune.Settings(args.method, sparsity, args.scope or "layer", args.match)
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
