"""Tasks of EleutherAI's lm-evaluation-harness on a run, and the run as a model of the harness.

import lm_eval
from jaxgpt.inference import load
from jaxgpt.tasks import harness

lm_eval.simple_evaluate(model=harness.model(load.load("RUN")), tasks=["hellaswag"])
"""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxgpt.errors import UserError, first_line, nearest
from jaxgpt.inference import load
from jaxgpt.run.process import text_table
from jaxgpt.tasks import compare
from jaxgpt.tasks.harness_model import check, model
from jaxgpt.tree import PyTree

__all__ = ["check", "evaluate", "examples", "metrics_of", "model", "table"]


def evaluate(
  run: load.Run,
  tasks: Sequence[str],
  include_path: str | None = None,
  limit: int | None = None,
  num_fewshot: int | None = None,
  chat: bool = False,
  batch_size: int | None = None,
  show: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, float]]:
  """Runs tasks of the harness.

  Args:
    run: From `load.load`.
    tasks: Names of tasks, groups or tags.
    include_path: Folder with more tasks, as YAML files.
    limit: Examples of each task. None: all.
    num_fewshot: Examples in a prompt. None: as each task says.
    chat: Write prompts in the run's chat template.
    batch_size: See `Requests`.
    show: See `Requests.show`. A task has requests of its own.

  Returns:
    {task: {metric: value}}, with the standard errors as 'METRIC_stderr'.

  Raises:
    UserError: lm-eval is not installed, a task does not exist or its data can't be loaded, or the
      run is not a causal language model.
  """
  lm = model(run, batch_size)  # says if lm-eval is not installed
  lm.requests.show = show
  found = _results(
    lm,
    tasks,
    _task_manager(tasks, include_path),
    limit,
    num_fewshot=num_fewshot,
    apply_chat_template=chat,
  )
  return {task: metrics_of(values) for task, values in found["results"].items()}


def examples(
  folder: epath.PathLike,
  tasks: Sequence[str],
  include_path: str | None = None,
  limit: int | None = None,
  batch_size: int | None = None,
) -> dict[str, compare.Examples]:
  """The examples of tasks with a run's score of each, for `compare.compare`.

  Args:
    folder: The run folder.
    tasks, include_path, limit, batch_size: As in `evaluate`.

  Raises:
    UserError: As in `evaluate`. Also raised if a task has no metric that is a mean over examples.
  """
  run = load.load(folder, use="generate")
  lm, manager = model(run, batch_size), _task_manager(tasks, include_path)
  found = _results(lm, tasks, manager, limit, log_samples=True, bootstrap_iters=0)
  out = {}
  for task, samples in found["samples"].items():
    # Some tasks have a sample per filter of a document.
    of = {(str(x["doc_id"]), x.get("filter", "none")): x for x in samples}
    rows = [of[key] for key in sorted(of, key=lambda key: (int(key[0]), key[1]))]
    names = [
      name
      for name in rows[0].get("metrics", ())
      if all(isinstance(row.get(name), bool | int | float) for row in rows)
    ]
    if not names:
      raise UserError(
        f"--tasks={task} has no metric that is a mean over examples, so it cannot be compared"
      )
    ones = np.ones(len(rows))
    measures = {n: (np.array([float(row[n]) for row in rows]), ones) for n in names}
    sources = [f"{task}:{row['doc_id']}" for row in rows]
    out[task] = compare.Examples(sources, [row["doc_hash"] for row in rows], "text", measures)
  return out


def _results(
  lm: Any,
  tasks: Sequence[str],
  manager: Any,
  limit: int | None,
  flag: str = "--tasks",
  **options: Any,
) -> dict[str, Any]:
  """The harness's own results. Its seeds are set for its time only."""
  import lm_eval

  states = random.getstate(), np.random.get_state()
  try:
    found = lm_eval.simple_evaluate(
      model=lm,
      tasks=list(tasks),
      task_manager=manager,
      limit=limit,
      **{"log_samples": False, **options},
    )
  except OSError as e:
    raise UserError(
      f"{flag}={','.join(tasks)}: the data of a task can't be loaded ({first_line(e)}); check its "
      "YAML file and the network"
    ) from e
  finally:
    random.setstate(states[0])
    np.random.set_state(states[1])
  assert found is not None, "the harness returns results in its only rank"
  return dict(found)


def in_training(
  run: load.Run, tasks: Sequence[str], include_path: str | None, limit: int | None
) -> Callable[[PyTree], dict[str, float]]:
  """An evaluator of tasks for the training loop: weights -> {'TASK/METRIC': value}.

  Args:
    run: The run. Its weights are not used.
    tasks, include_path, limit: As in `evaluate`.

  Raises:
    UserError: As in `evaluate`, except for the tasks' data.
  """
  lm = model(run, run.c.eval.batch_size)
  manager = _task_manager(tasks, include_path, "eval.tasks")

  def evaluate(params: PyTree) -> dict[str, float]:
    lm.requests.params = params
    found = _results(lm, tasks, manager, limit, "eval.tasks", bootstrap_iters=0)
    return {
      f"{task}/{name}": value
      for task, values in found["results"].items()
      for name, value in metrics_of(values).items()
      if value == value and not name.endswith("_stderr")
    }

  return evaluate


def metrics_of(values: Mapping[str, Any]) -> dict[str, float]:
  """{metric: value} of the harness's {'METRIC,FILTER': value}. The filter 'none' is left out."""
  out = {}
  for key, value in values.items():
    name, _, filter_ = key.partition(",")
    if isinstance(value, int | float) and filter_:
      out[name if filter_ == "none" else f"{name}/{filter_}"] = float(value)
  return out


def _task_manager(tasks: Sequence[str], include_path: str | None, flag: str = "--tasks") -> Any:
  """The index of the tasks. The harness's own 14,000 are only read if one of them is meant."""
  import lm_eval.tasks

  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  found = None
  for own in (False, True) if include_path else (True,):
    found = lm_eval.tasks.TaskManager(include_path=include_path, include_defaults=own)
    unknown = [task for task in tasks if not found.match_tasks([task])]
    if not unknown:
      return found
  names = list(found.all_tasks) if found else []
  raise UserError(
    f"{flag}={unknown[0]}: there is no such task; {nearest(unknown[0], names)}name a task of the "
    "harness (lm_eval ls tasks), or one of the YAML files in --include-path=DIR"
  )


def table(results: Mapping[str, Mapping[str, float]]) -> list[str]:
  """Lines that show results: task, metric, value and standard error."""
  rows = []
  for task, values in results.items():
    for name, value in values.items():
      if name.endswith("_stderr"):
        continue
      error = values.get(f"{name}_stderr")
      shown = f"± {error:.4f}" if error is not None and error == error else ""
      rows.append((task, name, f"{value:.4f}", shown))
  head = ("task", "metric", "value", "± stderr")
  return text_table.lines(head, rows, left=2, last_left=True)
