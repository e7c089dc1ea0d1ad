"""`jaxgpt generate`: continues a prompt with a run's model."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgpt.commands import Command
from jaxgpt.config.options import checkpoint_step, integer, option
from jaxgpt.errors import UserError

_MOST_BYTES = 64 << 20  # of a file with a prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
  workdir: str = option(help="run folder")
  step: int | str | None = checkpoint_step()
  prompt: str = option(
    "", help="text to continue; @FILE reads a file, @@TEXT is a text that begins with @"
  )
  chat: bool = option(
    False, help="the prompt is a user's message: write it in the run's chat template and answer it"
  )
  samples: int = integer(1, least=1, help="number of texts to draw")
  max_new: int = integer(200, least=1, help="maximum of new tokens")
  temperature: float | None = option(
    None,
    unset="the model's own, else 0.8",
    help="sampling temperature; 0: always the most likely token",
  )
  top_k: int | None = integer(
    None,
    unset="the model's own, else 0",
    help="draw from the k most likely tokens; 0: from all",
  )
  top_p: float | None = option(
    None,
    unset="the model's own, else 1.0",
    help="draw from the most likely tokens that together reach this probability",
  )
  min_p: float | None = option(
    None,
    unset="the model's own, else 0.0",
    help="draw from tokens with at least this fraction of the highest probability",
  )
  repetition_penalty: float | None = option(
    None,
    unset="the model's own, else 1.0",
    help="make tokens that the text already holds less likely; 1: do not",
  )
  presence_penalty: float | None = option(
    None,
    unset="the model's own, else 0.0",
    help="subtract this from the logits of tokens that the new text already holds",
  )
  frequency_penalty: float | None = option(
    None,
    unset="the model's own, else 0.0",
    help="subtract this from a token's logit each time that the new text holds it",
  )
  seed: int = integer(0, help="seed of the draws")


def run(args: GenerateOptions) -> None:
  """Prints the prompt with each continuation, or the answers alone with --chat."""
  from jaxgpt.commands.actions import backend
  from jaxgpt.inference import load
  from jaxgpt.inference import sampler as sampler_lib

  prompt = read_prompt(args.prompt)
  given = {
    name: value for name in load.Sampling._fields if (value := getattr(args, name)) is not None
  }
  load.Sampling()._replace(**given).check()
  backend.start()
  loaded = load.load(args.workdir, args.step, "generate")
  own, ignored = load.sampling_defaults(loaded)
  for line in _notices(given, own, load.Sampling(), ignored):
    print(line, file=sys.stderr)
  sampler = sampler_lib.Sampler(loaded, args.samples)
  texts = sampler(prompt, args.max_new, own._replace(**given), args.seed, args.chat)
  for i, text in enumerate(texts):
    if args.samples > 1:
      print(f"--- sample {i + 1} of {args.samples}")
    print(text if args.chat else prompt + text, flush=True)


def _notices(given: Mapping[str, float], own: Any, usual: Any, ignored: Sequence[str]) -> list[str]:
  """Lines on the settings that come from the model's generation_config.json."""
  taken = [
    f"{name}={value}"
    for name, value in own._asdict().items()
    if name not in given and value != getattr(usual, name)
  ]
  lines = [f"from the model's generation_config.json: {', '.join(taken)}"] if taken else []
  if ignored:
    lines.append(f"not followed of the model's generation_config.json: {', '.join(ignored)}")
  return lines


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
