"""`jaxgpt features`: trains a sparse autoencoder on a layer of a run and shows what it found."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import checkpoint_step, integer, option

_TAPS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_hidden")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesOptions:
  workdir: str = option(help="run folder, of training or of `jaxgpt import`")
  step: int | str | None = checkpoint_step()
  data: str | None = option(
    None, metavar="DIR", unset="the run's data", help="prepared folder with the text"
  )
  tap: str = option("resid_post", choices=_TAPS, help="which activations of the layer")
  layer: int | None = integer(None, unset="the middle one", help="layer, from 0")
  features: int | None = integer(
    None, least=1, unset="8 for each dimension", help="features to look for"
  )
  k: int = integer(16, least=1, help="features that are active at a token, at most")
  rows: int = integer(
    256, least=1, help="rows of the training split to read; their activations are in host memory"
  )
  steps: int = integer(1000, least=1, help="training steps")
  batch: int = integer(1024, least=1, help="activations of a step")
  lr: float = option(2e-3, above=0, help="peak learning rate, which falls to 0")
  seed: int = integer(0, help="seed of the autoencoder")
  top: int = integer(5, least=1, help="examples of each feature")
  show: int = integer(5, help="features to print, those with the largest activations")
  out: str | None = option(
    None,
    metavar="DIR",
    unset="only printed",
    help="folder to write: autoencoder.npz, and features.jsonl with the examples of every feature",
  )


def run(args: FeaturesOptions) -> None:
  """Trains, measures on the validation split, and prints features with their top examples."""
  from jaxgpt.commands.actions.interpret import features

  features.run(args)


COMMAND = Command(
  "features",
  "train a sparse autoencoder on a layer of a run, and show where its features are active",
  FeaturesOptions,
  run,
)
