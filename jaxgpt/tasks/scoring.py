"""Scores of predictions: a task's metrics with intervals, next to its baseline.

    python -m jaxgpt.tasks.scoring --task=sentiment --input=test.jsonl --predictions=predicted.jsonl

scores a file of predictions, which `jaxgpt predict` or another program wrote: a JSON object per row
of the input, in its order.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.run.process import text_table
from jaxgpt.storage import strict_json
from jaxgpt.storage.passed_over import PassedOver
from jaxgpt.tasks import bootstrap, row_labels, task
from jaxgpt.tasks.predict import rows as rows_lib
from jaxgpt.tasks.predict.protocol import Prediction
from jaxgpt.tasks.predict.rows import Row
from jaxgpt.text.readers import documents


class Report(NamedTuple):
  """The scores of some predictions.

  Attributes:
    scored: Rows that count.
    failed: Rows among them without a prediction, which count as wrong. Where numbers are predicted
      these are left out.
    left_out: {reason: rows that do not count}.
    scores: {metric: its estimate}. The first is the main one.
    baseline: The same of the baseline.
    baseline_name: A few words on the baseline.
    details: Further lines.
  """

  scored: int
  failed: int
  left_out: dict[str, int]
  scores: dict[str, bootstrap.Estimate]
  baseline: dict[str, bootstrap.Estimate]
  baseline_name: str
  details: list[str]

  def lines(self) -> list[str]:
    """A table for the user."""
    notes = [f"{self.failed:,} of them without a prediction"] if self.failed else []
    notes += [f"{count:,} more not scored: {why}" for why, count in self.left_out.items()]
    head = f"{self.scored:,} rows" + "".join(f"; {note}" for note in notes)
    columns = ["", "model", f"baseline: {self.baseline_name}"]
    cells = [[name, of, self.baseline[name]] for name, of in self.scores.items()]
    table = text_table.lines(columns, cells, left=len(columns))
    return [f"{head}; intervals of {bootstrap.LEVEL:.0%}", *table, *self.details]

  def to_json(self) -> dict[str, Any]:
    """The report as plain JSON."""
    as_lists = lambda of: {name: list(estimate) for name, estimate in of.items()}
    return {
      "rows": self.scored,
      "failed": self.failed,
      "left_out": self.left_out,
      "scores": as_lists(self.scores),
      "baseline": {"name": self.baseline_name} | as_lists(self.baseline),
    }


class Scorable(NamedTuple):
  """The rows that count: their numbers, and {reason: rows} of the others."""

  numbers: list[int]
  left_out: dict[str, int]


def scorable(
  scored: task.Task, rows: Sequence[Row], found: Sequence[Prediction] | None = None
) -> Scorable:
  """Finds the rows that have an answer to compare with.

  Args:
    scored: The task.
    rows: The rows.
    found: The prediction for each, as in `report`. None: not known yet.

  Raises:
    UserError: No row has one.
  """
  out = Scorable([], {})
  for number, row in enumerate(rows):
    if row.problem:
      why = "can't be read"
    elif not any(row.fields.get(answer) is not None for answer in scored.kinds.values()):
      why = f"no {' or '.join(dict.fromkeys(scored.kinds.values()))}"
    elif "messages" in row.fields and not _ends_with_answer(row.fields):
      why = "no answer to compare with, preceded by a message"
    elif found is not None and scored.numbers and not _given(found[number]):
      why = "no prediction"
    else:
      out.numbers.append(number)
      continue
    out.left_out[why] = out.left_out.get(why, 0) + 1
  if not out.numbers:
    reasons = "; ".join(f"{count:,} rows: {why}" for why, count in out.left_out.items())
    raise UserError(f"there is nothing to score: {reasons or 'the input has no rows'}")
  return out


def report(
  scored: task.Task, rows: Sequence[Row], found: Sequence[Prediction], seed: int = 0
) -> Report:
  """Scores predictions.

  Args:
    scored: The task.
    rows: Rows with their answers.
    found: The prediction for each, {'error': …} where there is none.
    seed: Seed of the bootstrap.

  Raises:
    UserError: No row can be scored.
  """
  numbers, left_out = scorable(scored, rows, found)
  fields, predictions = _kept(rows, found, numbers)
  baseline = scored.baseline(fields)
  return Report(
    len(numbers),
    sum(not p for p in predictions),
    left_out,
    _estimates(scored.measures(fields, predictions), len(numbers), seed),
    _estimates(scored.measures(fields, baseline), len(numbers), seed),
    scored.baseline_name,
    scored.details(fields, predictions),
  )


def values(scored: task.Task, rows: Sequence[Row], found: Sequence[Prediction]) -> dict[str, float]:
  """{metric: value} of predictions, without intervals. Arguments and errors as of `report`."""
  numbers, _ = scorable(scored, rows, found)
  measures = measures_of(scored, rows, found, numbers)
  return {name: measure(np.ones(len(numbers))) for name, measure in measures.items()}


def measures_of(
  scored: task.Task, rows: Sequence[Row], found: Sequence[Prediction], numbers: Sequence[int]
) -> task.Measures:
  """The task's metrics of the predictions for some rows, as functions of how often each counts.

  Args:
    scored, rows, found: As in `report`.
    numbers: The rows that count, see `scorable`.
  """
  return scored.measures(*_kept(rows, found, numbers))


def _kept(
  rows: Sequence[Row], found: Sequence[Prediction], numbers: Sequence[int]
) -> tuple[list[task.Fields], list[Prediction]]:
  """The fields of rows and their predictions, {} for those without one."""
  pairs = list(zip(rows, found, strict=True))
  kept = [pairs[number] for number in numbers]
  return [row.fields for row, _ in kept], [_given(p) for _, p in kept]


def _given(prediction: Prediction) -> Prediction:
  """The prediction, or {} in place of {'error': why}."""
  return {} if "error" in prediction else prediction


def _ends_with_answer(fields: Mapping[str, Any]) -> bool:
  messages = fields["messages"]
  return len(messages) > 1 and messages[-1].get("role") == "assistant"


def _estimates(measures: task.Measures, size: int, seed: int) -> dict[str, bootstrap.Estimate]:
  return {name: bootstrap.estimate(m, size, seed=seed) for name, m in measures.items()}


def of_file(scored: task.Task, rows: Iterable[Row], predictions: epath.PathLike) -> Report:
  """Scores a file of predictions.

  Args:
    scored: The task.
    rows: The rows of the input.
    predictions: A JSON Lines file with an object per row of the input, in its order.

  Raises:
    UserError: The file can't be read or has another number of lines than the input has rows, or a
      line is no prediction that the task can score.
  """
  path, found = epath.Path(predictions), list[Prediction]()
  try:
    with path.open("rb") as f:
      found = [_prediction(text, f"{path}:{number}") for number, text in enumerate(f, 1)]
  except OSError as e:
    raise UserError(f"{path} can't be read ({e.strerror or e}); name a file of predictions") from e
  given = list(rows)
  if len(given) != len(found):
    raise UserError(
      f"{path} has {len(found):,} predictions, but the input has {len(given):,} rows; predict for "
      "this input again"
    )
  for number in scorable(scored, given, found).numbers:
    if (value := _given(found[number])) and (why := scored.problem(given[number].fields, value)):
      raise UserError(f"{path}:{number + 1}: {why}; correct it, or choose another task")
  return report(scored, given, found)


def _prediction(text: bytes, where: str) -> Prediction:
  """A line of a file of predictions."""
  try:
    value = json.loads(text)
  except ValueError as e:
    raise UserError(f"{where}: not JSON ({e})") from e
  if not isinstance(value, dict):
    raise UserError(f"{where}: a prediction is an object, not {text[:40].decode(errors='replace')}")
  return value


def main(argv: Sequence[str] | None = None) -> int:
  """Scores a file of predictions, see the top of this file. Returns the exit code."""
  parser = argparse.ArgumentParser(prog="python -m jaxgpt.tasks.scoring", description=main.__doc__)
  parser.add_argument("--task", required=True, help="name of a task, or FILE.py:NAME")
  parser.add_argument("--input", required=True, help="file of rows with answers")
  parser.add_argument("--predictions", required=True, help="JSON Lines file of predictions")
  parser.add_argument("--kind", help="kind of the rows; default: the first that the task scores")
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  args = parser.parse_args(argv)
  try:
    scored = task.find(args.task)
    kind = args.kind or next(iter(scored.kinds))
    scored.check_kind(kind)
    rest = PassedOver()
    rows = rows_lib.read(documents.find(args.input, passed_over=rest), kind)
    found = of_file(scored, map(row_labels.Named(scored, kind), rows), args.predictions)
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return e.exit_code
  if rest.counts:
    print(f"passed over: {rest}", file=sys.stderr)
  print(strict_json.dumps(found.to_json(), indent=1) if args.json else "\n".join(found.lines()))
  return 0


if __name__ == "__main__":
  sys.exit(main())
