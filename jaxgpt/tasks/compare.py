"""Significance of the difference of two runs on the same examples: the paired bootstrap."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from jaxgpt.errors import UserError
from jaxgpt.inference import evaluate, load, scoring
from jaxgpt.run.process import text_table
from jaxgpt.storage.passed_over import PassedOver
from jaxgpt.tasks import bootstrap, row_labels, task
from jaxgpt.tasks import scoring as task_scoring
from jaxgpt.tasks.predict import job, protocol, registry, rows
from jaxgpt.text.readers import documents


class Comparison(NamedTuple):
  """A metric of two runs.

  Attributes:
    metric: Its name.
    first, second: Its value for each run.
    difference: Second minus first, with its interval and p-value.
  """

  metric: str
  first: float
  second: float
  difference: bootstrap.Difference


class Examples(NamedTuple):
  """The examples of an evaluation, with what a run made of them.

  Attributes:
    sources: The origin of each example.
    contents: A digest of each example's content. It depends on `form`.
    form: What the digests are of, such as the tokens of a tokenizer.
    measures: {metric: (sums, weights)} of each example, [N] each. The metric is the ratio of the
      sums over examples.
    notices: Lines for the user on data that is left out.
  """

  sources: Sequence[str]
  contents: Sequence[str]
  form: str
  measures: dict[str, tuple[np.ndarray, np.ndarray]]
  notices: Sequence[str] = ()


def examples_of(
  folder: epath.PathLike,
  source: evaluate.Source,
  step: int | str | None = None,
  batch_size: int | None = None,
) -> Examples:
  """Scores a run's predictions on a split or on files, by document.

  Args:
    folder: The run folder.
    source: The data.
    step: As for `load.load`.
    batch_size: As for `load.open_split`.

  Raises:
    UserError: The data can't be opened, or its predictions can't be scored one by one.
  """
  run = load.load(folder, step, "evaluate")
  if not scoring.has_scores(run.c):
    raise UserError(
      f"{folder}: the predictions of objective.name={run.c.objective.name!r} are not choices that "
      "can be scored one by one; compare language models or classifiers"
    )
  with evaluate.opened(run, folder, source, batch_size) as data:
    _, found = evaluate.evaluate(run, data)
    assert found is not None
    scored = found.examples()
    names, contents = [""] * len(scored.doc), [""] * len(scored.doc)
    num_bytes = np.zeros(len(scored.doc))
    for number, s in enumerate(data.batches.sources):
      here = np.flatnonzero(scored.source == number)
      docs = scored.doc[here]
      stored = s.split.read_many(docs, 0 * docs, s.split.lengths[docs] + 1)
      for i, name, ids in zip(here, s.split.source_names(docs.tolist()), stored):
        names[i], contents[i] = name, hashlib.sha256(ids.astype(np.int64).tobytes()).hexdigest()
        num_bytes[i] = len(run.tokenizer.decode(ids).encode())
      # A tokenizer may not restore each byte. The sum is known.
      num_bytes[here] *= s.split.bytes / max(num_bytes[here].sum(), 1)
  measures = {"loss": (scored.nll, scored.weight), "accuracy": (scored.correct, scored.weight)}
  if data.batches.predicts_all:
    measures["bits_per_byte"] = (scored.nll / math.log(2), num_bytes)
  return Examples(names, contents, run.tokenizer.digest, measures, data.notices)


def compare(
  first: Examples, second: Examples, *, resamples: int = bootstrap.RESAMPLES, seed: int = 0
) -> list[Comparison]:
  """Compares the metrics that two runs share.

  Args:
    first, second: The runs' examples.
    resamples: Number of resamples.
    seed: Seed of the draws.

  Raises:
    UserError: The examples differ, or there are fewer than two.
  """
  check_same(first, second)
  size, out = len(first.sources), []
  for metric, (sums, weights) in first.measures.items():
    others = second.measures.get(metric)
    # Nats per token of two tokenizers are not comparable; bits per byte are.
    if others is None or (first.form != second.form and metric != "bits_per_byte"):
      continue
    a, b = _ratio(sums, weights), _ratio(*others)
    found = bootstrap.difference(a, b, size, resamples, seed)
    ones = np.ones(size)
    out.append(Comparison(metric, a(ones), b(ones), found))
  if not out:
    raise UserError(
      "the runs share no metric that is comparable: they have "
      f"{', '.join(first.measures)} and {', '.join(second.measures)}, and other tokenizers"
    )
  return out


def on_task(
  folders: Sequence[epath.PathLike],
  name: str,
  data: str,
  *,
  batch_size: int = 32,
  resamples: int = bootstrap.RESAMPLES,
  seed: int = 0,
) -> tuple[list[Comparison], int, list[str]]:
  """Compares the metrics of a task that two runs reach on the rows of files.

  Args:
    folders: The two run folders.
    name: The task, see `task.find`.
    data: Files of rows with answers, separated by commas.
    batch_size: Rows of a batch on each device.
    resamples: Number of resamples.
    seed: Seed of the draws.

  Returns:
    (the comparisons, number of rows, lines for the user on data that is left out).

  Raises:
    UserError: The task or the files do not fit the runs, or the runs score other rows.
  """
  scored, rest = task.find(name), PassedOver()
  listed = documents.find(data.split(","), passed_over=rest)
  measures, rows_of = [], []
  for folder in folders:
    run = load.load(folder, devices=jax.local_devices())
    settings = protocol.Settings(batch_size, 200, load.Sampling(temperature=0.0), 0)
    predictor = registry.make(run, None, settings)
    scored.check_kind(predictor.kind)
    named = row_labels.Named(scored, predictor.kind, predictor.classes)
    given = list(map(named, rows.read(listed, predictor.kind)))
    found = [
      prediction
      for number, chunk in enumerate(job.chunks(given))
      for prediction in job.predict_rows(predictor, run.params, chunk, number)
    ]
    numbers, _ = task_scoring.scorable(scored, given, found)
    measures.append(task_scoring.measures_of(scored, given, found, numbers))
    rows_of.append(numbers)
  if rows_of[0] != rows_of[1]:
    raise UserError(
      f"--task={name}: the runs score {len(rows_of[0]):,} and {len(rows_of[1]):,} rows of {data}, "
      "which are not the same; name rows that both can read"
    )
  size = len(rows_of[0])
  if size < 2:
    raise UserError(f"{size} example cannot be resampled; compare on more")
  out = []
  for metric, a in measures[0].items():
    b, ones = measures[1][metric], np.ones(size)
    difference = bootstrap.difference(a, b, size, resamples, seed)
    out.append(Comparison(metric, a(ones), b(ones), difference))
  return out, size, [f"{data}: passed over: {rest}"] if rest.counts else []


def check_same(first: Examples, second: Examples) -> None:
  """Raises a UserError unless two runs were evaluated on the same examples."""
  way_out = "name data that both read in full with --data"
  if len(first.sources) != len(second.sources):
    raise UserError(
      f"the runs were evaluated on {len(first.sources):,} and {len(second.sources):,} examples; "
      f"{way_out}"
    )
  same_form = first.form == second.form
  for i, (a, b) in enumerate(zip(first.sources, second.sources)):
    if a != b:
      raise UserError(
        f"the runs were evaluated on different examples: number {i + 1} is {a} and {b}; {way_out}"
      )
    if same_form and first.contents[i] != second.contents[i]:
      raise UserError(
        f"the runs were evaluated on different examples: {a} has another content; {way_out}"
      )
  if len(first.sources) < 2:
    raise UserError(f"{len(first.sources)} example cannot be resampled; compare on more")


def _ratio(sums: np.ndarray, weights: np.ndarray) -> bootstrap.Measure:
  """The ratio of the weighted sums, such as nats per token."""
  return lambda times: float(times @ sums / max(float(times @ weights), 1e-9))


def table(found: Sequence[Comparison], names: Sequence[str]) -> list[str]:
  """Lines that show comparisons of two runs of these names."""
  lines = [("metric", *names, "difference", "95 % interval", "p")]
  for metric, first, second, d in found:
    interval = f"[{d.low:+.4f}, {d.high:+.4f}]"
    cells = f"{first:.4f}", f"{second:.4f}", f"{d.value:+.4f}", interval, f"{d.p_value:.3f}"
    lines.append((metric, *cells))
  return text_table.lines(lines[0], lines[1:])
