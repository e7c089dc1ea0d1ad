"""The options of commands that run the decoding engine, and the engine that follows from them."""

import dataclasses
from typing import TYPE_CHECKING, Any

from jaxgpt.config.options import Group, integer, option
from jaxgpt.errors import UserError

if TYPE_CHECKING:  # importing JAX takes a second, which --help should not
  from jaxgpt.inference import load
  from jaxgpt.inference.engine.engine import Engine
  from jaxgpt.inference.engine.requests import Stats

_DRAFTS = Group("drafts that the model verifies (texts of the same distribution, faster)")
_TOKENS = 4  # drafted at a time
CACHE_DTYPES = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
  """Options of `generate`, `chat` and `serve`."""

  draft: str | None = option(
    None,
    metavar="RUN",
    group=_DRAFTS,
    unset="none",
    help="run folder of a smaller model with the same tokenizer, which drafts tokens; ngram: draft "
    "what followed the text's last tokens where they stood before",
  )
  draft_tokens: int | None = integer(
    None,
    least=1,
    group=_DRAFTS,
    unset=f"{_TOKENS} with --draft",
    help="tokens that are drafted at a time",
  )
  cache_dtype: str | None = option(
    None,
    choices=CACHE_DTYPES,
    unset="the run's compute dtype",
    help="dtype of cached keys and values; int8: with a scale for each vector, rounded",
  )


def check(args: EngineOptions) -> None:
  """Raises a UserError for options that have no effect."""
  if args.draft_tokens and not args.draft:
    raise UserError(
      f"--draft-tokens={args.draft_tokens} needs --draft: add it, or leave --draft-tokens out"
    )


def make(run: "load.Run", args: EngineOptions, **sizes: Any) -> "Engine":
  """The engine of a run.

  Args:
    run: From `load.load`.
    args: The options.
    **sizes: Further arguments of `Engine`.

  Raises:
    UserError: The draft model cannot draft for the run, or does not exist.
  """
  from jaxgpt.inference import load
  from jaxgpt.inference.engine.drafting import drafter
  from jaxgpt.inference.engine.engine import Engine

  drafting = None
  if args.draft:
    draft = None if args.draft == drafter.NGRAM else load.load(args.draft, None, "generate")
    drafting = drafter.Drafting(args.draft_tokens or _TOKENS, draft)
  return Engine(run, drafting=drafting, cache_dtype=args.cache_dtype, **sizes)


def identity(args: EngineOptions) -> dict[str, Any]:
  """The options that texts depend on, as far as they are given."""
  drafts = {"draft": args.draft, "draft_tokens": args.draft_tokens or _TOKENS}
  cache = {"cache_dtype": args.cache_dtype}
  return (drafts if args.draft else {}) | (cache if args.cache_dtype else {})


def drafting_report(stats: "Stats") -> str | None:
  """A line on the drafts since an engine's start, or None without any."""
  if not stats.drafted:
    return None
  share = stats.accepted / stats.drafted
  return f"{stats.accepted:,} of {stats.drafted:,} drafted tokens accepted ({share:.1%})"
