"""The options of commands that draw texts, and the settings that follow from them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxgpt.config.options import Group, declared, integer, option
from jaxgpt.errors import UserError

if TYPE_CHECKING:  # importing JAX takes a second, which --help should not
  from jaxgpt.inference import load
  from jaxgpt.inference.engine.requests import Beams
  from jaxgpt.inference.sampling import Sampling

SAMPLING = Group("how tokens are drawn")
_BEAMS = Group("beam search")
_MOST_BYTES = 64 << 20  # of a file with a prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
  """Settings of `inference.sampling.Sampling`. None: the model's own."""

  temperature: float | None = option(
    None,
    group=SAMPLING,
    unset="the model's own, else 0.8",
    help="sampling temperature; 0: always the most likely token",
  )
  top_k: int | None = integer(
    None,
    group=SAMPLING,
    unset="the model's own, else 0",
    help="draw from the k most likely tokens; 0: from all",
  )
  top_p: float | None = option(
    None,
    group=SAMPLING,
    unset="the model's own, else 1.0",
    help="draw from the most likely tokens that together reach this probability",
  )
  min_p: float | None = option(
    None,
    group=SAMPLING,
    unset="the model's own, else 0.0",
    help="draw from tokens with at least this fraction of the highest probability",
  )
  repetition_penalty: float | None = option(
    None,
    group=SAMPLING,
    unset="the model's own, else 1.0",
    help="make tokens that prompt and new text already hold less likely; 1: do not",
  )
  presence_penalty: float | None = option(
    None,
    group=SAMPLING,
    unset="the model's own, else 0.0",
    help="subtract this from the logits of tokens that the new text already holds",
  )
  frequency_penalty: float | None = option(
    None,
    group=SAMPLING,
    unset="the model's own, else 0.0",
    help="subtract this from a token's logit each time that the new text holds it",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamOptions:
  """Options of commands that can search for a likely text in place of drawing one."""

  beams: int | None = integer(
    None,
    least=2,
    group=_BEAMS,
    unset="draw tokens",
    help="search with this many beams for a likely text in place of drawing one; a beam takes the "
    "place of a text in the batch",
  )
  length_penalty: float | None = option(
    None,
    group=_BEAMS,
    unset="1.0 with --beams",
    help="a text's score is the sum of its tokens' log-probabilities divided by their number to "
    "this power; 0: the sum, which favors short texts",
  )
  early_stopping: bool = option(
    False,
    group=_BEAMS,
    help="end a search when as many texts as beams have ended, although one that goes on could "
    "still become better",
  )


def beams(args: BeamOptions) -> "Beams | None":
  """The beam search that the options ask for.

  Raises:
    UserError: An option needs --beams, or a value is out of range.
  """
  from jaxgpt.inference.engine.requests import Beams

  if args.beams:
    penalty = 1.0 if args.length_penalty is None else args.length_penalty
    if not math.isfinite(penalty):
      raise UserError(f"--length-penalty={penalty} must be finite")
    return Beams(args.beams, penalty, args.early_stopping)
  for o in declared(BeamOptions):
    if (value := getattr(args, o.name)) != o.default:
      raise UserError(f"{o.label}={value} needs --beams: add it, or leave {o.label} out")
  return None


def read_prompt(prompt: str, flag: str = "--prompt") -> str:
  """The text of an option such as `--prompt`: a file's for @FILE, '@TEXT' for @@TEXT.

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
      f"{flag}={prompt}: {e}; give a text file in UTF-8, or the text itself, with @@ for an @ at "
      "its beginning"
    ) from e


def given(args: SamplingOptions) -> dict[str, float]:
  """{name: value} of the settings that the user gave.

  Raises:
    UserError: A value is out of range.
  """
  from jaxgpt.inference.sampling import Sampling

  found = {name: value for name in Sampling._fields if (value := getattr(args, name)) is not None}
  Sampling()._replace(**found).check()
  return found


def settings(run: "load.Run", chosen: Mapping[str, Any]) -> "tuple[Sampling, list[str]]":
  """How a run's texts are drawn.

  Args:
    run: The run.
    chosen: From `given`. The model's generation_config.json says the rest.

  Returns:
    (settings, lines on those that come from the model's file or are not followed).

  Raises:
    UserError: The file sets a value that is out of range.
  """
  from jaxgpt.inference import load

  own, ignored = load.sampling_defaults(run)
  return own._replace(**chosen), _notices(chosen, own, ignored)


def greedy(run: "load.Run", chosen: Mapping[str, Any]) -> "tuple[Sampling, list[str]]":
  """The settings of a search with beams, which draws nothing: as `settings`.

  Raises:
    UserError: A setting is given that has no effect then.
  """
  from jaxgpt.inference import load
  from jaxgpt.inference.sampling import Sampling

  search = Sampling(temperature=0.0)
  for name, value in chosen.items():
    if value != getattr(search, name):
      flag = "--" + name.replace("_", "-")
      raise UserError(f"{flag}={value} has no effect with --beams: nothing is drawn; leave it out")
  own, ignored = load.sampling_defaults(run)
  names = [name for name, value in own._asdict().items() if value != getattr(Sampling(), name)]
  names += ignored
  text = f"not followed of the model's generation_config.json: {', '.join(names)}"
  return search, [text] if names else []


def _notices(chosen: Mapping[str, Any], own: "Sampling", ignored: Sequence[str]) -> list[str]:
  from jaxgpt.inference.sampling import Sampling

  taken = [
    f"{name}={value}"
    for name, value in own._asdict().items()
    if name not in chosen and value != getattr(Sampling(), name)
  ]
  lines = [f"from the model's generation_config.json: {', '.join(taken)}"] if taken else []
  if ignored:
    lines.append(f"not followed of the model's generation_config.json: {', '.join(ignored)}")
  return lines
