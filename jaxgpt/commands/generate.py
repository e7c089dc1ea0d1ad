"""`jaxgpt generate`: continues a prompt, or those of a file, with a run's model."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.commands.actions.engine import EngineOptions
from jaxgpt.commands.actions.sampling import (
  SAMPLING,
  BeamOptions,
  SamplingOptions,
  read_prompt,
)
from jaxgpt.config.options import Group, checkpoint_step, integer, option
from jaxgpt.errors import UserError

_FORM = Group("form of the text (one of them; extra `guided`)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingOptions, BeamOptions, EngineOptions):
  workdir: str = option(help="run folder")
  step: int | str | None = checkpoint_step()
  prompt: str = option(
    "", help="text to continue; @FILE reads a file, @@TEXT is a text that begins with @"
  )
  chat: bool = option(
    False, help="the prompt is a user's message: write it in the run's chat template and answer it"
  )
  input: str | None = option(
    None,
    metavar="FILE",
    unset="--prompt",
    help="file, folder, pattern or URL of prompts, in any format that `jaxgpt data` reads: the "
    "column text, or with --chat messages; a file of text has a prompt per line; -: standard input",
  )
  output: str | None = option(
    None,
    metavar="FILE",
    unset="standard output",
    help="JSON Lines file to write, in the order of --input; the same command again continues it",
  )
  batch_size: int = integer(8, least=1, help="texts that are drawn together")
  samples: int = integer(1, least=1, help="number of texts to draw")
  max_new: int = integer(200, least=1, help="maximum of new tokens")
  stop: tuple[str, ...] = option((), metavar="TEXT", help="string that ends a text")
  json_schema: str | None = option(
    None, metavar="JSON", group=_FORM, help="the text is JSON of this schema; @FILE reads a file"
  )
  regex: str | None = option(
    None, metavar="REGEX", group=_FORM, help="the whole text matches this regular expression"
  )
  choice: tuple[str, ...] = option(
    (), metavar="TEXT", group=_FORM, help="the text is one of these choices; give it for each"
  )
  seed: int = integer(0, group=SAMPLING, help="seed of the draws")


def run(args: GenerateOptions) -> None:
  """Prints the prompt with each continuation, or the answers alone with --chat."""
  from jaxgpt.commands.actions import generate

  if args.input:
    if args.prompt:
      raise UserError("--prompt and --input both give prompts: leave one of them out")
  elif args.output:
    raise UserError(f"--output={args.output} needs --input: add it, or leave --output out")
  if not args.input:
    generate.prompt(args, read_prompt(args.prompt))
  else:
    generate.file(args)


COMMAND = Command("generate", "continue a prompt with a run's model", GenerateOptions, run)
