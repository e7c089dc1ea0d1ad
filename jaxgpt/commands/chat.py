"""`jaxgpt chat`: a conversation with a run's model in the terminal."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.commands.actions.engine import EngineOptions
from jaxgpt.commands.actions.sampling import SAMPLING, SamplingOptions
from jaxgpt.config.options import checkpoint_step, integer, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions(SamplingOptions, EngineOptions):
  workdir: str = option(help="run folder")
  step: int | str | None = checkpoint_step()
  system: str = option("", help="system message")
  max_new: int = integer(0, unset="the context's rest", help="maximum of new tokens of an answer")
  seed: int | None = integer(
    None, group=SAMPLING, unset="a new one each time", help="seed of each answer"
  )


def run(args: ChatOptions) -> None:
  """Talks until the user leaves."""
  from jaxgpt.commands.actions import chat

  chat.run(args)


COMMAND = Command("chat", "talk to a run's model in the terminal", ChatOptions, run)
