"""A run as the server sees it."""

import functools
import time
from collections.abc import Callable, Sequence

from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.engine.limits import Limits
from jaxgpt.inference.prompts import Prompts
from jaxgpt.inference.sampling import Sampling
from jaxgpt.inference.server.calls import Served
from jaxgpt.text.tokenizers.base import Tokenizer


def writes(
  run: load.Run,
  name: str,
  prompts: Prompts,
  defaults: Sampling,
  limits: Limits,
  most_choices: int,
) -> Served:
  """A model that writes text.

  Args:
    run: From `load.load`.
    name: Its name in the API.
    prompts: Encodes its prompts.
    defaults: How tokens are drawn where a request does not say it.
    limits: Of its engine.
    most_choices: Most choices of one call.
  """
  return Served(
    name=name,
    fingerprint=_fingerprint(run),
    created=int(time.time()),
    context=limits.longest,
    vocab_size=run.tokenizer.vocab_size,
    chats=_chats(prompts),
    prompts=prompts,
    defaults=defaults,
    token_text=token_text(run.tokenizer),
    check=limits.check,
    most_choices=most_choices,
  )


def embeds(
  run: load.Run,
  name: str,
  embed: Callable[[Sequence[str]], tuple[list[list[float]], int]],
  most_choices: int,
) -> Served:
  """A model that gives embeddings. For the arguments see `writes` and `Served`."""
  return Served(
    name=name,
    fingerprint=_fingerprint(run),
    created=int(time.time()),
    context=0,
    vocab_size=run.tokenizer.vocab_size,
    chats=False,
    prompts=None,
    defaults=Sampling(),
    token_text=token_text(run.tokenizer),
    check=lambda request: None,
    most_choices=most_choices,
    embed=embed,
  )


def _fingerprint(run: load.Run) -> str:
  return f"step {run.step}, config {run.identity['config'][:8]}"


def _chats(prompts: Prompts) -> bool:
  try:
    return bool(prompts.template)
  except UserError:
    return False


def token_text(tokenizer: Tokenizer) -> Callable[[int], str]:
  """A function from the id of a token to its text, with the space before a word if it has one."""
  names = {i: name for name, i in tokenizer.special_ids.items()}
  before = tokenizer.encode("a")

  @functools.lru_cache(maxsize=1 << 16)
  def text(i: int) -> str:
    return names[i] if i in names else tokenizer.continuation(before, [i])

  return text
