"""`jaxgpt data`: turns text files into tokenized shards."""

import dataclasses
import json
from typing import Any

from jaxgpt.commands import Command
from jaxgpt.config.options import integer, key_value, option, take
from jaxgpt.errors import printable
from jaxgpt.text.prepare.options import EXECUTION, EXECUTORS, Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
  paths: tuple[str, ...] = option(
    positional=True,
    metavar="PATH",
    help="files, folders, glob patterns or URLs (s3://, gs://, hf://, https://); - is standard "
    "input",
  )
  out: str = option(metavar="DIR", help="folder to write")
  overwrite: bool = option(False, help="replace an earlier prepared folder")
  executor: str = option(
    "local",
    choices=EXECUTORS,
    metavar="KIND",
    group=EXECUTION,
    help="process (this one) | local (all cores of this machine) | slurm | ray",
  )
  workers: int = integer(
    0,
    group=EXECUTION,
    help="tasks at the same time; 0: one per core, or as many as a cluster takes",
  )
  executor_option: tuple[tuple[str, Any], ...] = option(
    (),
    metavar="KEY=VALUE",
    parse=key_value(json.loads),
    group=EXECUTION,
    help="argument of datatrove's executor of this kind, such as partition=cpu and "
    "time=20:00:00 for slurm",
  )


def run(args: DataOptions) -> None:
  """Prepares a folder and says how to train on it."""
  from jaxgpt.commands.actions import progress
  from jaxgpt.storage import malloc
  from jaxgpt.text.prepare import executors, prepare

  malloc.give_back()
  with progress.OfPreparation() as report:
    prepare.prepare(
      args.paths,
      args.out,
      overwrite=args.overwrite,
      report=report,
      executor=executors.make(args.executor, args.workers, dict(args.executor_option), report),
      **take(args, Options),
    )
  out = printable(args.out)
  print(f"wrote {out}; train with --config.data.path={out}")


COMMAND = Command("data", "turn text files into tokenized shards", DataOptions, run)
