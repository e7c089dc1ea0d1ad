"""`jaxgpt lens`: trains a tuned lens on a run and compares it with the logit lens."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import checkpoint_step, integer, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class LensOptions:
  workdir: str = option(help="run folder, of training or of `jaxgpt import`")
  step: int | str | None = checkpoint_step()
  data: str | None = option(
    None, metavar="DIR", unset="the run's data", help="prepared folder with the text"
  )
  steps: int = integer(100, least=1, help="training steps of the translators, a batch each")
  rows: int = integer(64, least=1, help="rows of the training split to train on")
  lr: float = option(1e-2, above=0, help="peak learning rate, which falls to 0")
  out: str | None = option(
    None,
    metavar="FILE",
    unset="WORKDIR/tuned_lens/STEP.npz, where `jaxgpt explain` finds it",
    help="NPZ file to write: a [L, D, D], b [L, D], and a digest of the weights they belong to",
  )


def run(args: LensOptions) -> None:
  """Trains, measures on the validation split, prints a table and writes the maps."""
  from jaxgpt.commands.actions.interpret import tuned_lens

  tuned_lens.run(args)


COMMAND = Command(
  "lens", "train a tuned lens: what each layer of a run would predict", LensOptions, run
)
