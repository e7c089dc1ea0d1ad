"""`jaxgpt serve`: a run behind OpenAI's protocol, and a page to talk to it."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.commands.actions.engine import EngineOptions
from jaxgpt.config.options import checkpoint_step, integer, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineOptions):
  workdir: str = option(help="run folder")
  step: int | str | None = checkpoint_step()
  host: str = option(
    "127.0.0.1", help="address to listen at; 0.0.0.0: all, for other machines to reach it"
  )
  port: int = option(8000, least=0, most=65535, help="port to listen at; 0: any that is free")
  api_key: str = option(
    "",
    metavar="KEY",
    unset="$JAXGPT_API_KEY, else none",
    help="key that requests must bring as 'Authorization: Bearer KEY'; @FILE reads it from a file",
  )
  allow_host: tuple[str, ...] = option(
    (),
    metavar="NAME",
    help="further name under which clients reach the server, such as that of a proxy",
  )
  name: str | None = option(
    None,
    unset="that of the run's folder, or of the folder around it if that is called run",
    help="name of the model in the API",
  )
  rows: int = integer(8, least=1, help="texts that are written at the same time")
  cache_tokens: int | None = integer(
    None,
    least=1,
    unset="a context for each of --rows, at most 8,192",
    help="tokens that the cache holds; a text takes its prompt's and its most new ones",
  )
  queue: int = integer(64, help="texts that may wait; beyond it requests get the status 429")
  timeout: float = option(600.0, above=0, help="most seconds for a response")
  max_body: int = integer(4 << 20, least=1024, help="most bytes of a request")


def run(args: ServeOptions) -> int:
  """Serves until SIGTERM or SIGINT, then finishes the texts that it has begun."""
  from jaxgpt.errors import optional

  for module in ("starlette", "uvicorn", "prometheus_client"):
    optional(module, "serve", "jaxgpt serve")
  from jaxgpt.commands.actions import serve

  return serve.run(args)


COMMAND = Command(
  "serve", "answer requests in OpenAI's protocol, and serve a page to talk to", ServeOptions, run
)
