"""The server of a run: loads it, makes its engine, and serves."""

import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxgpt.commands.actions import backend
from jaxgpt.commands.actions import engine as engine_options
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.server import app, calls, metrics, served, serving
from jaxgpt.inference.server.worker import Worker
from jaxgpt.run import run_folder
from jaxgpt.tasks.predict import registry, rows
from jaxgpt.training import uses

_KEY = "JAXGPT_API_KEY"


def run(args: Any) -> int:
  """Serves a run. `args` are the options of `jaxgpt serve`. Returns the exit code."""
  engine_options.check(args)
  key = api_key(args.api_key)
  hosts = hosts_of(args.host, args.allow_host)
  listener = serving.bind(args.host, args.port)  # fails before the weights are read
  backend.start()
  name = args.name or name_of(args.workdir)
  model, worker = model_of(args, name)
  listens_at = listener.getsockname()[1]
  shown = f"[{args.host}]" if ":" in args.host else args.host
  print(f"serving {name} at http://{shown}:{listens_at}", flush=True)
  if args.host not in app.LOOPBACK and not key:
    _report(
      f"anyone who reaches {args.host}:{listens_at} may use the model; --api-key asks for a key"
    )
  settings = app.Settings(args.timeout, args.max_body, key, hosts)
  numbers = metrics.Metrics((lambda: worker.stats) if worker else None)
  make = lambda: app.App(model, worker, numbers, settings)
  code = serving.run(make, worker, listener, _report)
  if worker and (line := engine_options.drafting_report(worker.stats)):
    _report(line)
  return code


def model_of(args: Any, name: str) -> tuple[calls.Served, Worker | None]:
  """Loads the model of a run.

  Args:
    args: The options of `jaxgpt serve`.
    name: The model's name in the API.

  Returns:
    (the model, what runs the engine that writes its texts: None if it gives embeddings).
  """
  begin = time.monotonic()
  c = run_folder.read_config(args.workdir)
  if c.model.head in ("pooler", "none"):
    engine_options.check_none(args, "the model gives embeddings and writes no text")
    loaded = load.load(args.workdir, args.step, "export")
    return served.embeds(loaded, name, embedder(loaded), args.rows + args.queue), None
  uses.check(c, "generate")
  loaded = load.load(args.workdir, args.step, "generate")
  prompts = engine_options.prompts(loaded, args)
  if args.template_variables:
    _ = prompts.template  # one that does not read them is an error
  drafting = engine_options.drafting_of(args)
  engine = engine_options.make(
    loaded, args, drafting, max_rows=args.rows, cache_tokens=args.cache_tokens
  )
  defaults, ignored = load.sampling_defaults(loaded)
  if ignored:
    _report(f"not followed of the model's generation_config.json: {', '.join(ignored)}")
  longest = engine.limits.longest
  if longest < loaded.c.data.seq_len:
    _report(
      f"--cache-tokens={args.cache_tokens} is less than the model's context: a prompt and its "
      f"answer have at most {longest:,} tokens together, not {loaded.c.data.seq_len:,}"
    )
  engine.compile()
  _report(f"loaded step {loaded.step} and compiled in {time.monotonic() - begin:.1f} s")
  worker = Worker(engine, args.rows + args.queue)
  return served.writes(loaded, name, prompts, defaults, engine.limits, worker.capacity), worker


def embedder(run: load.Run) -> Callable[[Sequence[str]], tuple[list[list[float]], int]]:
  """A function from texts to their embeddings and the number of their tokens.

  Args:
    run: From `load.load`. A run that gives embeddings.
  """
  predictor = registry.make(run)

  def embed(texts: Sequence[str]) -> tuple[list[list[float]], int]:
    found = predictor(run.params, rows.of_values(texts, predictor.kind))
    for one in found:
      if isinstance(one, UserError):
        raise one
    tokens = sum(map(len, run.tokenizer.encode_batch(texts)))
    return [one["embedding"] for one in found if isinstance(one, dict)], tokens

  return embed


def api_key(given: str) -> str:
  """The API key: an option's value, the content of its @FILE, or the environment's.

  Raises:
    UserError: The file can't be read, or the key is empty or not printable ASCII.
  """
  key = given or os.environ.get(_KEY, "")
  source = "--api-key" if given else f"${_KEY}"
  if given.startswith("@"):
    try:
      key = pathlib.Path(given[1:]).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as e:
      raise UserError(f"--api-key={given}: {e}; give a file that holds the key alone") from e
  if (given or key) and not (key and key.isascii() and key.isprintable() and " " not in key):
    raise UserError(f"{source}: a key is printable ASCII without spaces; choose another")
  return key


def hosts_of(host: str, allowed: Sequence[str]) -> tuple[str, ...]:
  """Names of this server that requests may use. (): any, on an address that others reach.

  Args:
    host: The address that it listens at.
    allowed: Names that the user allows.
  """
  if host not in app.LOOPBACK and not allowed:
    return ()
  return tuple(dict.fromkeys([*app.LOOPBACK, host.lower(), *(name.lower() for name in allowed)]))


def name_of(workdir: str) -> str:
  """The name of a run in the API: 'chat' for runs/chat and for runs/chat/run."""
  path = pathlib.Path(os.path.abspath(workdir))
  return path.parent.name if path.name == "run" and path.parent.name else path.name


def _report(line: str) -> None:
  print(line, file=sys.stderr, flush=True)
