"""`jaxgpt predict`: labels, tags, answers, embeddings or texts for the rows of a file."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.commands.actions.processes import ProcessOptions
from jaxgpt.commands.actions.sampling import BeamOptions
from jaxgpt.config.options import checkpoint_step, integer, key_value, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions(BeamOptions, ProcessOptions):
  workdir: str = option(help="run folder")
  step: int | str | None = checkpoint_step()
  input: str = option(
    metavar="FILE",
    help="file, folder, pattern or URL of the rows, in any format that `jaxgpt data` reads; a file "
    "of text has a row per line; -: standard input",
  )
  output: str = option(
    metavar="FILE", help="JSON Lines file to write, in the order of the input; -: standard output"
  )
  kind: str | None = option(
    None, unset="that of the run's data", help="kind of the rows, as for `jaxgpt data`"
  )
  field: tuple[str, ...] = option(
    (), parse=key_value(), metavar="NAME=COLUMN", help="column that holds a field of the kind"
  )
  format: str | None = option(
    None,
    unset="by the file's suffix",
    help="format of the input, as for `jaxgpt data`, or lines: a row per line of text",
  )
  encoding: str | None = option(None, unset="UTF-8", help="encoding of the input")
  task: str | None = option(
    None,
    metavar="NAME",
    help="also score the predictions against the answers in the input: a task of docs/tasks.md, or "
    "FILE.py:NAME",
  )
  batch_size: int = integer(32, least=1, help="rows of a batch on each device")
  max_new: int = integer(200, least=1, help="maximum of new tokens of a generated text")
  temperature: float = option(
    0.0, least=0, help="sampling temperature of generated text; 0: always the most likely token"
  )
  top_p: float = option(
    1.0, above=0, most=1, help="draw from the most likely tokens that reach this probability"
  )
  seed: int = integer(0, help="seed of the draws")
  json: bool = option(False, help="print the scores of --task as one JSON object")


def run(args: PredictOptions) -> None:
  """Writes the predictions, and reports rows without one."""
  from jaxgpt.commands.actions import predict

  predict.run(args)


COMMAND = Command(
  "predict", "predict labels, tags, answers, embeddings or texts", PredictOptions, run
)
