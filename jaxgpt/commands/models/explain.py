"""`jaxgpt explain`: one HTML page on what a model computes from a prompt."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import checkpoint_step, integer, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainOptions:
  workdir: str = option(help="run folder, of training or of `jaxgpt import`")
  step: int | str | None = checkpoint_step()
  prompt: str = option(
    metavar="TEXT",
    help="text to explain; an encoder predicts where the text has its mask token, such as [MASK]",
  )
  out: str = option(metavar="FILE", help="HTML file to write")
  corrupted: str | None = option(
    None,
    metavar="TEXT",
    help="a second text of equally many tokens, for causal tracing: which activations of the "
    "prompt restore its answer",
  )
  top: int = integer(8, least=1, help="alternatives to each prediction")
  lens: str | None = option(
    None,
    metavar="FILE",
    unset="WORKDIR/tuned_lens/STEP.npz, if it is there",
    help="tuned lens to show next to the logit lens, from `jaxgpt lens`",
  )


def run(args: ExplainOptions) -> None:
  """Writes the page and prints what it says in short."""
  from jaxgpt.commands.actions.interpret import explain

  explain.run(args)


COMMAND = Command(
  "explain", "write an HTML page on what a model computes from a prompt", ExplainOptions, run
)
