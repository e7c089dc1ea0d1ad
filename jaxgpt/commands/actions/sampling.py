"""The options of commands that draw texts, and the settings that follow from them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxgpt.config.options import Group, integer, option
from jaxgpt.errors import UserError

if TYPE_CHECKING:  # importing JAX takes a second, which --help should not
  from jaxgpt.inference import load
  from jaxgpt.inference.sampling import Sampling

SAMPLING = Group("how tokens are drawn")
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
