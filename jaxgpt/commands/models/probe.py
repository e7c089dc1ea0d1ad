"""`jaxgpt probe`: how well tags of words can be read linearly from each layer of a run."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import checkpoint_step, integer, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeOptions:
  workdir: str = option(help="run folder, of training or of `jaxgpt import`")
  step: int | str | None = checkpoint_step()
  data: str = option(
    metavar="DIR", help="prepared folder of kind tagging, in the tokens of the run's tokenizer"
  )
  split: str = option("train", choices=("train", "validation", "test"), help="split to read")
  words: int = integer(
    5000,
    least=10,
    help="words to read; 30 % of those that are looked at are held out to measure on",
  )
  tags: str | None = option(
    None, metavar="A,B,C", unset="all", help="look at words with these tags only"
  )
  seed: int = integer(0, help="seed of the split of the words and of the control task")


def run(args: ProbeOptions) -> None:
  """Prints a row for each layer."""
  from jaxgpt.commands.actions.interpret import probe

  probe.run(args)


COMMAND = Command(
  "probe",
  "fit linear probes to each layer of a run, with a control task",
  ProbeOptions,
  run,
)
