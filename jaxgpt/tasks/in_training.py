"""Metrics of tasks and samples of a training run: `task`, `eval.tasks`, `log.samples`."""

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

from jaxgpt.errors import UserError
from jaxgpt.inference import load, sampling
from jaxgpt.parallel import distributed
from jaxgpt.run import generation
from jaxgpt.run.metric_writers import Sample
from jaxgpt.run.process import output
from jaxgpt.storage.passed_over import PassedOver
from jaxgpt.tasks import harness, row_labels, scoring, task
from jaxgpt.tasks.predict import job, protocol, registry, rows, texts
from jaxgpt.text.readers import documents
from jaxgpt.training import evaluators, uses
from jaxgpt.tree import PyTree

PREFIX = "task/"  # of the metrics' names
T = TypeVar("T")


def make(context: evaluators.Context) -> evaluators.Evaluator | None:
  """The evaluator of a run's task, or None if it has none.

  Raises:
    UserError: The task, its file or the kind of its rows does not fit the run.
  """
  c = context.c
  if not c.task.name:
    return None
  if not c.task.data:
    raise UserError(f"task.name={c.task.name!r} needs task.data: a file of rows with answers")
  found = task.find(c.task.name, c.code_folder)
  run = _run(context)
  settings = protocol.Settings(
    c.task.batch_size,
    c.task.max_new,
    sampling.Sampling(temperature=0.0),
    c.seed,
    keep_weights=False,  # training needs the memory
  )
  predictor = registry.make(run, None, settings)
  found.check_kind(predictor.kind)
  rest = PassedOver()
  listed = documents.find(c.task.data.split(","), passed_over=rest)
  if rest.counts and distributed.is_first():
    output.tell([f"task.data: passed over: {rest}"])
  fields = dict(field.split("=", 1) for field in c.task.fields)
  there = list(rows.read(listed, predictor.kind, fields, c.task.format or None))
  given = _named(found, predictor, sample(there, c.task.rows), c.task.data)
  if len(given) < len(there) and distributed.is_first():
    drawn = f"a sample of {len(given):,} of {len(there):,} rows"
    output.tell([f"metrics of {c.task.name} are of {drawn} of {c.task.data} (task.rows)"])
  distributed.check_same(
    f"the rows of task.data={c.task.data!r}",
    job.digest([job.identity(row) for row in given]),
    "give all processes the same file",
  )

  def evaluate(params: PyTree) -> Mapping[str, float]:
    predictions = [
      prediction
      for number, chunk in enumerate(job.chunks(given))
      for prediction in job.predict_rows(predictor, params, chunk, number)
    ]
    values = scoring.values(found, given, predictions)
    return {PREFIX + name: value for name, value in values.items()}

  return evaluate


def sample(items: Sequence[T], count: int) -> list[T]:
  """A random sample in the order of the items, always the same. Files may be sorted by class.

  Args:
    items: The items.
    count: Size of the sample. 0, or more than there are: all items.
  """
  if not count or count >= len(items):
    return list(items)
  return [items[i] for i in sorted(random.Random(0).sample(range(len(items)), count))]


def _run(context: evaluators.Context) -> load.Run:
  """The run that is being trained as one to use, without weights."""
  c = context.c
  written, _ = generation.of_training(c, context.tokenizer, context.folder)
  return load.Run(
    c=c,
    parts=context.parts,
    mesh=context.mesh,
    params=None,
    step=0,
    tokenizer=context.tokenizer,
    data_digest=context.data_digest,
    generation=written or generation.read(context.folder, context.tokenizer),
  )


def make_harness(context: evaluators.Context) -> evaluators.Evaluator | None:
  """The evaluator of `eval.tasks`, tasks of EleutherAI's harness, or None without them.

  Raises:
    UserError: lm-eval is not installed, a task does not exist, or the model writes no text.
  """
  c = context.c
  tasks = [name.strip() for name in c.eval.tasks.split(",") if name.strip()]
  if not tasks:
    return None
  uses.check(c, "generate")
  limit = c.eval.tasks_limit or None
  return harness.in_training(_run(context), tasks, c.eval.tasks_path or None, limit)


def make_sampler(context: evaluators.Context) -> evaluators.Sampler | None:
  """The sampler of `log.samples`, or None without one.

  Raises:
    UserError: The model writes no text, or a prompt is too long for it.
  """
  s = context.c.log.samples
  if not s.every:
    return None
  uses.check(context.c, "generate")
  settings = protocol.Settings(
    len(s.prompts),
    s.max_new,
    sampling.Sampling(temperature=s.temperature),
    context.c.seed,
    keep_weights=False,  # training needs the memory
  )
  writer = texts.Texts(_run(context), "text", settings)
  given = [rows.Row(f"log.samples.prompts[{i}]", {"text": t}) for i, t in enumerate(s.prompts)]
  for row in given:
    try:
      writer.request(row, 0)
    except UserError as e:
      raise UserError(f"{row.where}={row.fields['text']!r}: {e}") from e

  def sample(params: PyTree) -> list[Sample]:
    found = writer(params, given)
    written = [str(one) if isinstance(one, UserError) else one["text"] for one in found]
    return [Sample(*pair) for pair in zip(s.prompts, written, strict=True)]

  return evaluators.Sampler(s.every, sample)


def _named(
  found: task.Task, predictor: protocol.Predictor, given: Sequence[rows.Row], data: str
) -> list[rows.Row]:
  """Rows with the model's names for their labels.

  Raises:
    UserError: None can be scored, or a label can't be. So it is known before the first step.
  """
  try:
    out = list(map(row_labels.Named(found, predictor.kind, predictor.classes), given))
    scoring.scorable(found, out)
  except UserError as e:
    raise UserError(f"task.data={data!r}: {e}") from e
  return out


EVALUATORS: tuple[evaluators.EvaluatorMaker, ...] = (make, make_harness, make_sampler)
