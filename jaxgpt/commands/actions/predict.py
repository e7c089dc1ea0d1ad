"""What `jaxgpt predict` does."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxgpt.commands.actions import backend, progress
from jaxgpt.commands.actions import sampling as sampling_options
from jaxgpt.config import options
from jaxgpt.errors import UserError
from jaxgpt.inference import load, sampling
from jaxgpt.parallel import cluster, distributed
from jaxgpt.storage import buckets, files, strict_json
from jaxgpt.storage.passed_over import PassedOver
from jaxgpt.tasks import row_labels, scoring, task
from jaxgpt.tasks.predict import job, protocol, registry, rows, texts
from jaxgpt.text.readers import documents
from jaxgpt.training import train_step

_STREAM = "-"
_OF_DRAWS = ("top_p", "seed")
_OF_BEAMS = ("beams", "length_penalty", "early_stopping")
_OF_TEXTS = ("max_new", "temperature", *_OF_DRAWS, *_OF_BEAMS)


def run(args: Any) -> None:
  """Runs the command. `args` are its options."""
  settings = cluster.find(args.coordinator, args.num_processes, args.process_id)
  if settings is not None and _STREAM in (args.input, args.output):
    raise UserError("several processes need files: give --input and --output other than -")
  if args.task and args.output == _STREAM:
    raise UserError(f"--task={args.task} scores a file: give --output another value than -")
  found = task.find(args.task) if args.task else None  # a wrong name ends the command at once
  if args.json and not found:
    raise UserError("--json prints the scores of --task: add it, or leave --json out")
  backend.start(several=settings is not None)
  with (
    distributed.joined(settings, args.join_timeout),
    inputs(args.input, args.format) as (listed, form),
    progress.Live("rows", compiles=True, shown=_has_room(args.output)) as live,
  ):
    _predict(args, listed, form, found, live)


def _has_room(output: str) -> bool:
  """Whether a terminal may show the work: in the first process, if no predictions go there."""
  return distributed.is_first() and not (output == _STREAM and sys.stdout.isatty())


@contextlib.contextmanager
def inputs(where: str, form: str | None = None) -> Iterator[tuple[list[files.File], str | None]]:
  """The files of --input, or standard input for -, and their format. `form` is that of --format."""
  if where == _STREAM:
    with rows.standard_input() as (spool, found):
      yield [spool], form or found
  else:
    rest = PassedOver()
    listed = documents.find(where, passed_over=rest)
    if rest.counts:
      job.say(f"passed over: {rest}")
    yield listed, form


def _refuse(args: Any, names: Sequence[str], why: str) -> None:
  """Refuses options that are not at their defaults."""
  for o in options.declared(type(args)):
    if o.name in names and (value := getattr(args, o.name)) != o.default:
      raise UserError(f"{o.label}={value} {why}; leave it out")


def _predict(
  args: Any,
  listed: list[files.File],
  form: str | None,
  scored: task.Task | None,
  live: progress.Live,
) -> None:
  loaded = load.load(args.workdir, args.step, devices=jax.local_devices())
  draws = sampling.Sampling(temperature=args.temperature, top_p=args.top_p)
  search = sampling_options.beams(args)
  shown = progress.OfChunks(live)
  settings = protocol.Settings(
    args.batch_size, args.max_new, draws, args.seed, beams=search, tell=shown.share
  )
  made = registry.make(loaded, args.kind, settings)
  if not isinstance(made, texts.Texts):
    _refuse(args, _OF_TEXTS, "is for models that write text, and this one does not")
  elif not args.temperature:
    _refuse(args, _OF_DRAWS, "needs --temperature above 0: otherwise nothing is drawn")
  if scored:
    scored.check_kind(made.kind)
  if note := train_step.ema_note(loaded.c.optim, loaded.step):
    job.say(note)
  reading = dict(fields=dict(args.field), form=form, encoding=args.encoding)
  read = lambda: rows.read(listed, made.kind, **reading)
  if scored:
    named = row_labels.Named(scored, made.kind, made.classes)
    for row in read():  # a label that can't be scored is found before the work
      named(row)
  if live.shown and not any(buckets.is_remote(file.address) for file in listed):
    shown.total = sum(1 for _ in read())

  def predict(chunk: Sequence[rows.Row], number: int) -> list[protocol.Prediction]:
    shown.begin(number * job.CHUNK, len(chunk))
    return job.predict_rows(made, loaded.params, chunk, number)

  if args.output == _STREAM:
    account = job.stream(predict, read(), sys.stdout)
  else:
    identity = {
      **loaded.identity,
      "kind": made.kind,
      "settings": [*settings[:2], list(draws), settings.seed],
      **({"beams": dataclasses.asdict(search)} if search else {}),
    }
    count = (lambda done: None) if live.shown else None
    account = job.run(predict, read(), args.output, identity, job.say, count)
  live.clear()
  if not distributed.is_first():
    return
  for line in account.lines():
    job.say(line)
  if scored:
    report = scoring.of_file(scored, map(named, read()), args.output)
    print(strict_json.dumps(report.to_json(), indent=1) if args.json else "\n".join(report.lines()))
