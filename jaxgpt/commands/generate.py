"""`jaxgpt generate`: continues a prompt with a run's model."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import integer, option
from jaxgpt.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
  workdir: str = option(help="run folder")
  step: int | None = integer(None, unset="the newest", help="step of the checkpoint")
  prompt: str = option("", help="text to continue; @FILE reads a file")
  samples: int = integer(1, least=1, help="number of texts to draw")
  max_new: int = integer(200, least=1, help="maximum of new tokens")
  temperature: float = option(0.8, help="sampling temperature; 0: always the most likely token")
  top_k: int = integer(0, help="draw from the k most likely tokens; 0: from all")
  top_p: float = option(
    1.0, help="draw from the most likely tokens that together reach this probability"
  )
  min_p: float = option(
    0.0, help="draw from tokens with at least this fraction of the highest probability"
  )
  seed: int = integer(0, help="seed of the draws")


def run(args: GenerateOptions) -> None:
  """Prints the prompt with each continuation."""
  from jaxgpt.commands.actions import backend
  from jaxgpt.inference import load

  sampling = load.Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
  prompt = _read(args.prompt)
  backend.start()
  sampler = load.Sampler(load.load(args.workdir, args.step, "generate"), args.samples)
  for i, text in enumerate(sampler(prompt, args.max_new, sampling, args.seed)):
    if args.samples > 1:
      print(f"--- sample {i + 1} of {args.samples}")
    print(prompt + text, flush=True)


def _read(prompt: str) -> str:
  if not prompt.startswith("@"):
    return prompt
  try:
    with open(prompt[1:], encoding="utf-8") as f:
      return f.read()
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(f"--prompt={prompt}: {e}; give a text file, or the text itself") from e


COMMAND = Command("generate", "continue a prompt with a run's model", GenerateOptions, run)
