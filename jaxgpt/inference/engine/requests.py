"""Input and output of the decoding engine: requests, and pieces of their texts."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.inference.sampling import Sampling

_USUAL = Sampling()

# Values of `Piece.finish`. A request that fails ends with 'error: ' and the reason.
STOP, LENGTH, CANCELLED, ERROR = "stop", "length", "cancelled", "error: "


def problem(finish: str | None) -> str:
  """The reason why a request failed, or '' if it did not. `finish`: see `Piece`."""
  return finish.removeprefix(ERROR) if finish and finish.startswith(ERROR) else ""


JSON, REGEX, CHOICE = "JSON schema", "regular expression", "choices"  # values of `Constraint.kind`


@dataclasses.dataclass(frozen=True)
class Constraint:
  """The form of a text. Make one with `of_schema`, `of_regex` or `of_choices`.

  Attributes:
    kind: `JSON`, `REGEX` or `CHOICE`.
    value: A JSON schema, a regular expression of the whole text, or the choices as a JSON array.
  """

  kind: str
  value: str

  @classmethod
  def of_schema(cls, schema: Mapping[str, Any]) -> "Constraint":
    """JSON that a JSON schema allows."""
    return cls(JSON, json.dumps(schema))

  @classmethod
  def of_regex(cls, regex: str) -> "Constraint":
    """Texts that a regular expression matches as a whole, in the syntax of Rust's crate `regex`."""
    return cls(REGEX, regex)

  @classmethod
  def of_choices(cls, choices: Sequence[str]) -> "Constraint":
    """One of several texts.

    Raises:
      UserError: There is none, or one is empty.
    """
    if not choices or not all(choices):
      raise UserError("choices: give at least one, and none that is empty")
    return cls(CHOICE, json.dumps(list(choices)))


@dataclasses.dataclass(frozen=True)
class Beams:
  """Beam search: see `engine.beams`.

  Attributes:
    width: Beams that go on from each step to the next.
    length_penalty: The score of a text of L tokens is the sum of their log-probabilities divided by
      L to this power. 0: the sum itself, which favors short texts.
    early_stopping: End as soon as `width` texts have ended, without asking whether one that goes on
      could still become better.
  """

  width: int
  length_penalty: float = 1.0
  early_stopping: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to continue.

  Attributes:
    prompt: Token ids, at least one.
    max_new: Most new tokens. The context is the other limit.
    sampling: How tokens are drawn.
    seed: Seed of the draws. Two requests that are equal in everything have equal texts.
    stop: Strings that end the text. It ends before the first of them.
    logprobs: None, or the number of alternatives whose log-probabilities are wanted for each
      token, next to the token's own.
    constraint: The form of the text, or None for any.
    beams: Search for a likely text in place of drawing one. Its sampling is greedy, and its text
      comes in one piece.
  """

  prompt: tuple[int, ...]
  max_new: int
  sampling: Sampling = _USUAL
  seed: int = 0
  stop: tuple[str, ...] = ()
  logprobs: int | None = None
  constraint: Constraint | None = None
  beams: Beams | None = None


class Token(NamedTuple):
  """A token of a text.

  Attributes:
    id: The token.
    text: What it adds to the text. A character that several tokens write is the last one's.
    logprob: log p(token | what is before it) by the model, before temperature, penalties and
      filters, or None if it was not asked for.
    alternatives: (token id, its log-probability) of the most likely tokens, best first.
  """

  id: int
  text: str
  logprob: float | None = None
  alternatives: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
  """A piece of a request's text. The texts of all its pieces in a row are the whole.

  Attributes:
    request: The number that `Engine.add` returned.
    text: Text that no later token changes: half a character and what may become a stop string are
      held back.
    tokens: The tokens that wrote it. The token that ended the text is not among them.
    finish: None if the request goes on, else why it ended: 'stop' (an end token, a stop string, or
      a prescribed form that is complete), 'length' (`max_new` or the context), 'cancelled', or
      'error: …'.
  """

  request: int
  text: str
  tokens: tuple[Token, ...]
  finish: str | None


class Stats(NamedTuple):
  """The engine's state, and totals since its start.

  Attributes:
    running: Requests with a row.
    waiting: Requests in the queue.
    blocks: Blocks of the cache.
    blocks_used: Those that running requests hold.
    prefilled: Tokens of prompts that were computed.
    reused: Tokens of prompts that were found in the cache.
    decoded: Tokens drawn and read.
    drafted: Tokens that a drafter guessed.
    accepted: Those of them that the model took.
  """

  running: int
  waiting: int
  blocks: int
  blocks_used: int
  prefilled: int
  reused: int
  decoded: int
  drafted: int = 0
  accepted: int = 0
