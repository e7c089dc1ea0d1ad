"""`jaxgpt train`: trains a model, or resumes an interrupted run."""

import dataclasses

from jaxgpt.commands import Command
from jaxgpt.commands.actions.processes import ProcessOptions
from jaxgpt.config.options import option, overrides
from jaxgpt.run.process import launch, output, stop_signal


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(ProcessOptions):
  config: str = option(
    metavar="FILE.py[:ARG]", help="the experiment; overrides follow as --config.KEY=VALUE"
  )
  workdir: str = option(help="run folder for checkpoints, metrics and the config")
  accept_changes: bool = option(
    default=False,
    help="go on with changed keys that alter the result, such as optim.lr or train.steps, and "
    "record them",
  )
  overrides: tuple[str, ...] = overrides()


def run(args: TrainOptions) -> int:
  """Trains, and prints the step at which the run ended."""
  with output.lasting(), stop_signal.ended_at_once():
    return _run(args)


def _run(args: TrainOptions) -> int:
  from jaxgpt import config
  from jaxgpt.parallel import cluster

  settings = cluster.find(args.coordinator, args.num_processes, args.process_id)
  loaded = None
  if settings is None:  # report a bad config before the heavy imports
    loaded = config.load(args.config, args.overrides)
    config.resolve(loaded[0])
  from jaxgpt.commands.actions import backend
  from jaxgpt.hf.weight_source import WEIGHT_SOURCES
  from jaxgpt.parallel import distributed
  from jaxgpt.tasks.in_training import EVALUATORS
  from jaxgpt.training import evaluation, loop

  backend.start(several=settings is not None)
  with distributed.joined(settings, args.join_timeout):
    c, origin = loaded or config.load(args.config, args.overrides)
    outcome = loop.train(
      c,
      args.workdir,
      origin,
      WEIGHT_SOURCES,
      EVALUATORS,
      args.accept_changes,
      launched=launch.launched(),
    )
    is_first = distributed.is_first()
  stopped, result = outcome.stopped, outcome.result
  if stopped:
    if is_first:
      line = (
        f"stopped by {stopped.name} after step {outcome.step} of {c.train.steps}; everything is "
        "saved: run the same command to resume"
      )
      output.tell([line])
    return 128 + stopped
  if is_first:
    text = f"; validation {evaluation.describe(result)}" if result else "; no validation split"
    lines = [f"done: {args.workdir} holds {outcome.step} steps{text}"]
    if outcome.early:
      lines.append(
        f"ended before step {c.train.steps}: {c.checkpoint.best} has not improved for "
        f"{c.eval.patience} evaluations"
      )
    if outcome.best:
      step, value = outcome.best
      lines.append(f"best: {c.checkpoint.best} {value:.4f} at step {step}; --step=best uses it")
    output.tell(lines)
  return 0


COMMAND = Command("train", "train a model, or resume an interrupted run", TrainOptions, run)
