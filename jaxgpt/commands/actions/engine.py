"""The options of commands that run the decoding engine, and the engine that follows from them."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from jaxgpt.config.options import Group, flags, integer, key_value, option
from jaxgpt.errors import UserError
from jaxgpt.storage import strict_json

if TYPE_CHECKING:  # importing JAX takes a second, which --help should not
  from jaxgpt.inference import load
  from jaxgpt.inference.engine.drafting.drafter import Drafting
  from jaxgpt.inference.engine.engine import Engine
  from jaxgpt.inference.engine.requests import Stats
  from jaxgpt.inference.prompts import Prompts

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
  template_variables: tuple[tuple[str, Any], ...] = option(
    (),
    flag="template-variable",
    metavar="NAME=VALUE",
    parse=key_value(json.loads),
    help="variable of the chat template for all conversations that do not set it, such as "
    "enable_thinking=false",
  )


def check(args: EngineOptions) -> None:
  """Raises a UserError for options that have no effect."""
  if args.template_variables and not getattr(args, "chat", True):
    name, value = args.template_variables[0]
    raise UserError(
      f"--template-variable={name}={strict_json.dumps(value)} needs --chat: add it, or leave "
      "--template-variable out"
    )
  if args.draft_tokens and not args.draft:
    raise UserError(
      f"--draft-tokens={args.draft_tokens} needs --draft: add it, or leave --draft-tokens out"
    )


def check_none(args: EngineOptions, why: str) -> None:
  """Raises a UserError for any of the options, none of which has an effect for the reason `why`."""
  for flag, field in zip(flags(EngineOptions), dataclasses.fields(EngineOptions), strict=True):
    if getattr(args, field.name):
      raise UserError(f"{flag} has no effect here: {why}; leave it out")


def drafting_of(args: EngineOptions) -> "Drafting | None":
  """How tokens are drafted, or None if they are not. Loads the draft model.

  Raises:
    UserError: There is no such model.
  """
  from jaxgpt.inference import load
  from jaxgpt.inference.engine.drafting import drafter

  if not args.draft:
    return None
  draft = None if args.draft == drafter.NGRAM else load.load(args.draft, None, "generate")
  return drafter.Drafting(args.draft_tokens or _TOKENS, draft)


def make(
  run: "load.Run", args: EngineOptions, drafting: "Drafting | None", **sizes: Any
) -> "Engine":
  """The engine of a run.

  Args:
    run: From `load.load`.
    args: The options.
    drafting: From `drafting_of`.
    **sizes: Further arguments of `Engine`.

  Raises:
    UserError: The draft model cannot draft for the run.
  """
  from jaxgpt.inference.engine.engine import Engine

  return Engine(run, drafting=drafting, cache_dtype=args.cache_dtype, **sizes)


def prompts(run: "load.Run", args: EngineOptions) -> "Prompts":
  """The encoder of a run's prompts."""
  from jaxgpt.inference.prompts import Prompts

  return Prompts(run, dict(args.template_variables))


def identity(args: EngineOptions, drafting: "Drafting | None") -> dict[str, Any]:
  """The options that texts depend on, as far as they are given. `drafting`: see `drafting_of`."""
  drafts: dict[str, Any] = {"draft": args.draft, "draft_tokens": args.draft_tokens or _TOKENS}
  if drafting and drafting.run:
    drafts["draft_run"] = drafting.run.identity
  cache = {"cache_dtype": args.cache_dtype}
  template = {"template_variables": dict(args.template_variables)}
  return (
    (drafts if args.draft else {})
    | (cache if args.cache_dtype else {})
    | (template if args.template_variables else {})
  )


def drafting_report(stats: "Stats") -> str | None:
  """A line on the drafts since an engine's start, or None without any."""
  if not stats.drafted:
    return None
  share = stats.accepted / stats.drafted
  return f"{stats.accepted:,} of {stats.drafted:,} drafted tokens accepted ({share:.1%})"
