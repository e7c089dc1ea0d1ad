"""What `jaxgpt generate` does."""

import dataclasses
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from jaxgpt.commands.actions import backend, sampling
from jaxgpt.commands.actions import engine as engine_options
from jaxgpt.commands.actions.predict import inputs
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.engine.drafting.drafter import Drafting
from jaxgpt.inference.engine.requests import JSON, Constraint, Piece, Request, Stats, problem
from jaxgpt.inference.prompts import Prompts
from jaxgpt.inference.sampling import Sampling
from jaxgpt.tasks.predict import job, rows
from jaxgpt.tasks.predict.protocol import Prediction
from jaxgpt.tasks.predict.rows import Row


def prompt(args: Any, text: str) -> None:
  """Continues one prompt on the terminal, as it is written if there is one sample.

  Raises:
    UserError: A text cannot go on in the form that is asked for.
  """
  run, draws = _loaded(args)
  prompts = engine_options.prompts(run, args)
  ids = prompts.chat([{"role": "user", "content": text}]) if args.chat else prompts.text(text)
  rows = min(args.samples * (args.beams or 1), args.batch_size)
  engine = engine_options.make(run, args, engine_options.drafting_of(args), max_rows=rows)
  wanted = _requests(args, draws, ids, args.seed)
  clock, why = _Clock(), ""
  engine.check(wanted[0])
  if args.samples == 1:
    print("" if args.chat else text, end="", flush=True)
    for piece in clock.timed(engine.run(wanted)):
      print(piece.text, end="", flush=True)
      why = problem(piece.finish)
    print(flush=True)
  else:
    texts = [""] * args.samples
    for piece in clock.timed(engine.run(wanted)):
      texts[piece.request] += piece.text
      why = why or problem(piece.finish)
    for i, one in enumerate(texts):
      print(f"--- sample {i + 1} of {args.samples}")
      print(one if args.chat else text + one, flush=True)
  clock.report(engine.stats())
  if why:
    raise UserError(why)


def file(args: Any) -> None:
  """Continues the prompts of --input, in order, to --output or standard output."""
  run, draws = _loaded(args)
  drafting = engine_options.drafting_of(args)
  engine = engine_options.make(run, args, drafting, max_rows=args.batch_size)
  prompts, clock = engine_options.prompts(run, args), _Clock()
  # A faulty form is the fault of no row, nor are beams for which there is no room.
  engine.check(_requests(args, draws, (run.tokenizer.bos_id,), args.seed)[0])

  def continued(some: Sequence[Row], chunk: int) -> list[Prediction]:
    found: list[Prediction] = [{"error": row.problem} for row in some]
    wanted, owners = list[Request](), list[int]()
    for i, row in enumerate(some):
      if row.problem:
        continue
      try:
        seed = args.seed + (chunk * job.CHUNK + i) * args.samples
        asked = _requests(args, draws, _ids(prompts, row, args.chat), seed)
        engine.check(asked[0])
      except UserError as e:
        found[i] = {"error": str(e)}
        continue
      wanted += asked
      owners.append(i)
    texts = engine.texts(wanted, clock.timed)
    for n, i in enumerate(owners):
      found[i] = _prediction(texts[n * args.samples : (n + 1) * args.samples])
    return found

  with inputs(args.input) as (listed, form):
    read = rows.read(listed, "chat" if args.chat else "text", form=form)
    if not args.output:
      account = job.stream(continued, read, sys.stdout)
    else:
      identity = _identity(args, run, draws, drafting)
      account = job.run(continued, read, args.output, identity, job.say)
  for line in account.lines():
    job.say(line)
  clock.report(engine.stats())


def _loaded(args: Any) -> tuple[load.Run, Sampling]:
  """The run, and how its texts are drawn."""
  engine_options.check(args)
  if constraint(args) and args.draft:  # before the weights are read
    raise UserError(
      f"--draft={args.draft} drafts no text of a prescribed form: leave it out, or the form"
    )
  chosen, search = sampling.given(args), sampling.beams(args)
  _check_beams(args)
  backend.start()
  run = load.load(args.workdir, args.step, "generate")
  draws, notices = (sampling.greedy if search else sampling.settings)(run, chosen)
  for line in notices:
    print(line, file=sys.stderr)
  return run, draws


def _check_beams(args: Any) -> None:
  """Refuses options that do not go with --beams, before the weights are read."""
  if not args.beams:
    return
  if args.samples > 1:
    raise UserError(
      f"--samples={args.samples} would be one text {args.samples} times with --beams: leave it out"
    )
  if constraint(args):
    raise UserError(f"--beams={args.beams} finds no text of a prescribed form: leave one out")
  if args.seed:
    raise UserError(
      f"--seed={args.seed} has no effect with --beams: nothing is drawn; leave it out"
    )
  if args.draft:
    raise UserError(f"--draft={args.draft} drafts nothing with --beams: leave one of them out")
  if args.beams > args.batch_size:
    raise UserError(
      f"--beams={args.beams} needs a batch of at least {args.beams}: raise --batch-size, which is "
      f"{args.batch_size}"
    )


def _requests(args: Any, draws: Sampling, ids: Sequence[int], seed: int) -> list[Request]:
  """A request for each sample of a prompt."""
  first = Request(
    tuple(ids),
    args.max_new,
    draws,
    seed,
    tuple(args.stop),
    constraint=constraint(args),
    beams=sampling.beams(args),
  )
  return [dataclasses.replace(first, seed=seed + i) for i in range(args.samples)]


def constraint(args: Any) -> Constraint | None:
  """The form of the texts that the options ask for.

  Raises:
    UserError: There are two, or one is not read.
  """
  names = [name for name in ("json_schema", "regex", "choice") if getattr(args, name)]
  flags = ["--" + name.replace("_", "-") for name in names]
  if len(flags) > 1:
    raise UserError(f"{' and '.join(flags)} each prescribe the text: leave all but one out")
  if args.json_schema:
    return Constraint(JSON, sampling.read_prompt(args.json_schema, flags[0]))
  if args.regex:
    return Constraint.of_regex(args.regex)
  return Constraint.of_choices(args.choice) if args.choice else None


def _ids(prompts: Prompts, row: Row, chat: bool) -> list[int]:
  return prompts.row(row.fields) if chat else prompts.text(row.fields["text"])


def _prediction(texts: Sequence[tuple[str, str]]) -> Prediction:
  """A line of the output: {'text', 'finish'}, or {'texts', 'finishes'} of several samples.

  {'error'} if one of them failed.
  """
  if why := next(filter(None, (problem(finish) for _, finish in texts)), ""):
    return {"error": why}
  if len(texts) == 1:
    return {"text": texts[0][0], "finish": texts[0][1]}
  return {"texts": [text for text, _ in texts], "finishes": [why for _, why in texts]}


def _identity(
  args: Any, run: load.Run, draws: Sampling, drafting: Drafting | None
) -> dict[str, Any]:
  """Everything besides the rows that the texts depend on."""
  names = ("chat", "samples", "max_new", "stop", "seed", "batch_size")
  form, search = constraint(args), sampling.beams(args)
  return {
    **run.identity,
    "sampling": draws._asdict(),
    **{name: getattr(args, name) for name in names},
    **({"constraint": [form.kind, form.value]} if form else {}),
    **({"beams": dataclasses.asdict(search)} if search else {}),
    **engine_options.identity(args, drafting),
  }


class _Clock:
  """Counts tokens and the time between the first pieces and the last ones."""

  def __init__(self) -> None:
    self._tokens, self._seconds = 0, 0.0

  def timed(self, pieces: Iterable[Piece]) -> Iterable[Piece]:
    """Passes pieces on. The time to the first, with the compilation, does not count."""
    start = None
    for piece in pieces:
      now = time.perf_counter()
      if start is None:
        start = last = now
      else:
        self._tokens += len(piece.tokens)
        self._seconds += now - last
        last = now
      yield piece

  def report(self, stats: Stats) -> None:
    """Prints the rate, and how good the drafts were, to standard error."""
    if self._seconds > 0:
      rate = self._tokens / self._seconds
      print(f"{self._tokens:,} tokens after the first, {rate:,.1f} tokens/s", file=sys.stderr)
    if line := engine_options.drafting_report(stats):
      print(line, file=sys.stderr)
