"""A task's metrics in the evaluations of a training run (the config's `task` section)."""

from collections.abc import Mapping

from jaxgpt.errors import UserError
from jaxgpt.inference import load, sampling
from jaxgpt.parallel import distributed
from jaxgpt.run import generation
from jaxgpt.tasks import scoring, task
from jaxgpt.tasks.predict import job, protocol, registry, rows
from jaxgpt.text.readers import documents
from jaxgpt.training import evaluators
from jaxgpt.tree import PyTree

PREFIX = "task/"  # of the metrics' names


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
  written, _ = generation.of_training(c, context.tokenizer, context.folder)
  run = load.Run(
    c=c,
    parts=context.parts,
    mesh=context.mesh,
    params=None,
    step=0,
    tokenizer=context.tokenizer,
    data_digest=context.data_digest,
    generation=written or generation.read(context.folder, context.tokenizer),
  )
  settings = protocol.Settings(
    c.task.batch_size, c.task.max_new, sampling.Sampling(temperature=0.0), c.seed
  )
  predictor = registry.make(run, None, settings)
  found.check_kind(predictor.kind)
  listed = documents.find(c.task.data.split(","))
  given: list[rows.Row] = []
  for row in rows.read(listed, predictor.kind):
    given.append(row)
    if len(given) == c.task.rows:
      break
  _check(found, given, c.task.data)
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


def _check(found: task.Task, given: list[rows.Row], data: str) -> None:
  """Refuses rows of which none can be scored, before the first step."""
  try:
    scoring.scorable(found, given)
  except UserError as e:
    raise UserError(f"task.data={data!r}: {e}") from e


EVALUATORS: tuple[evaluators.EvaluatorMaker, ...] = (make,)
