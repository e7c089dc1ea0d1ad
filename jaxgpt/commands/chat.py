"""`jaxgpt chat`: a conversation with a run's model in the terminal."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.config.options import checkpoint_step, integer, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions:
  workdir: str = option(help="run folder")
  step: int | str | None = checkpoint_step()
  system: str = option("", help="system message")
  max_new: int = integer(0, unset="the context's rest", help="maximum of new tokens of an answer")
  temperature: float | None = option(
    None,
    unset="the model's own, else 0.8",
    help="sampling temperature; 0: always the most likely token",
  )
  top_k: int | None = integer(
    None, unset="the model's own, else 0", help="draw from the k most likely tokens; 0: from all"
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
    help="make tokens that the conversation already holds less likely; 1: do not",
  )
  presence_penalty: float | None = option(
    None,
    unset="the model's own, else 0.0",
    help="subtract this from the logits of tokens that the answer already holds",
  )
  frequency_penalty: float | None = option(
    None,
    unset="the model's own, else 0.0",
    help="subtract this from a token's logit each time that the answer holds it",
  )
  seed: int | None = integer(None, unset="a new one each time", help="seed of each answer")


def run(args: ChatOptions) -> None:
  """Talks until the user leaves."""
  from jaxgpt.commands.actions import chat

  chat.run(args)


COMMAND = Command("chat", "talk to a run's model in the terminal", ChatOptions, run)
