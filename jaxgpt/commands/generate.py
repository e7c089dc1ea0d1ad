"""`jaxgpt generate`: continues a prompt, or those of a file, with a run's model."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.commands.actions.sampling import SAMPLING, SamplingOptions
from jaxgpt.config.options import checkpoint_step, integer, option
from jaxgpt.errors import UserError

_MOST_BYTES = 64 << 20  # of a file with a prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingOptions):
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


def read_prompt(prompt: str) -> str:
  """The text of `--prompt`: a file's for @FILE, '@TEXT' for @@TEXT.

  Raises:
    UserError: The file can't be read, is no UTF-8 text, or is too long.
  """
  if not prompt.startswith("@"):
    return prompt
  if prompt.startswith("@@"):
    return prompt[1:]
  path = prompt[1:]
  try:
    with open(path, "rb") as f:
      data = f.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
      raise ValueError(f"{path} has more than {_MOST_BYTES:,} bytes")
    return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
  except (OSError, ValueError) as e:
    raise UserError(
      f"--prompt={prompt}: {e}; give a text file in UTF-8, or the text itself, with @@ for an @ at "
      "its beginning"
    ) from e


COMMAND = Command("generate", "continue a prompt with a run's model", GenerateOptions, run)
