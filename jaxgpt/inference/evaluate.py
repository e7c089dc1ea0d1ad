"""Evaluation of a run in detail: tables, strided windows, and files that are not prepared."""

import contextlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import ml_collections
import numpy as np
from etils import epath

from jaxgpt.data import label_numbers, layouts, pipeline, strided
from jaxgpt.errors import UserError
from jaxgpt.inference import contamination, load, scoring
from jaxgpt.inference.breakdown import Breakdown, Row
from jaxgpt.parallel import distributed
from jaxgpt.run import label_names, run_folder
from jaxgpt.text.filters import decontaminate
from jaxgpt.text.prepare import prepare, shards
from jaxgpt.text.tokenizers import labels
from jaxgpt.training import evaluation, objectives

# (batches done, batches in all) -> None
Show: TypeAlias = Callable[[int, int], None]


class Source(NamedTuple):
  """Data to evaluate on.

  Attributes:
    data: Prepared folder, or files as `jaxgpt data` takes them. None: the run's own data.
    split: Split of prepared data. None: validation.
    kind: Kind of the documents in files. None: the usual one of the run's objective.
    fields: ((name, column), …) of files.
  """

  data: str | None = None
  split: str | None = None
  kind: str | None = None
  fields: tuple[tuple[str, str], ...] = ()


class Opened(NamedTuple):
  """Batches to evaluate on.

  Attributes:
    c: The run's config with this data.
    batches: The batches.
    where: Name of the data for a user.
    notices: Lines for the user.
    left_out: Of files: {'documents': documents left out by rule, 'files': files by reason}.
  """

  c: ml_collections.ConfigDict
  batches: pipeline.Batches
  where: str
  notices: Sequence[str] = ()
  left_out: Mapping[str, Mapping[str, int]] | None = None


@contextlib.contextmanager
def opened(
  run: load.Run, workdir: epath.PathLike, source: Source, batch_size: int | None = None
) -> Iterator[Opened]:
  """Opens data for a run. Files are tokenized with the run's tokenizer into a temporary folder.

  Args:
    run: From `load.load`.
    workdir: Its folder.
    source: The data.
    batch_size: As for `load.open_split`.

  Raises:
    UserError: See `load.open_split` and `prepare.prepare`. Also raised if `split` is for files, or
      `kind` or `fields` for prepared data.
  """
  data = source.data
  if data is None or not _is_raw(data):
    for flag, value in (("kind", source.kind), ("field", source.fields)):
      if value:
        raise UserError(
          f"--{flag} is for files that are not prepared, and {data or 'the data of the run'} is; "
          "leave it out, or name files with --data"
        )
    split = source.split or "validation"
    c, batches = load.open_split(run, split, batch_size, data)
    yield Opened(c, batches, split)
    return
  if source.split:
    raise UserError(
      f"--split={source.split}: {data} is not a prepared folder, so it has no splits; leave it out"
    )
  with tempfile.TemporaryDirectory(prefix="jaxgpt-evaluate-") as folder:
    out = f"{folder}/data"
    manifest = _prepare(run, workdir, source, out)
    classes = label_names.of_run(run.c, run.data_digest)
    # Which labels the files have is known now. Positions are prepared again, with their names.
    if _are_positions(manifest["label_names"], classes):
      out = f"{folder}/named"
      manifest = _prepare(run, workdir, source, out, classes)
    c, batches = load.open_split(run, "train", batch_size, out)
    distributed.check_same(
      f"the digest of --data={data}", batches.digest, "show all processes the same files"
    )
    dropped, passed_over = manifest["dropped"], manifest.get("passed_over", {})
    notices = [
      f"{data}: {n:,} of {manifest['read']:,} documents are left out: {rule}"
      for rule, n in dropped.items()
    ]
    notices += [
      f"{data}: {entry['count']:,} passed over: {reason}, such as {entry['examples'][0]}"
      for reason, entry in passed_over.items()
    ]
    files = {reason: entry["count"] for reason, entry in passed_over.items()}
    yield Opened(c, batches, data, notices, {"documents": dropped, "files": files})


def _is_raw(data: str) -> bool:
  """Whether --data names files to tokenize, not prepared folders."""
  if any(shards.exists(folder) for folder in pipeline.folders(data)):
    return False
  return any(mark in data for mark in "*?[") or epath.Path(data).exists()


def _are_positions(given: Sequence[str], classes: Sequence[str]) -> bool:
  """Whether labels of files are not the names of the run's classes, but places among them."""
  numbering = labels.Numbering(classes)
  return (
    bool(given and classes)
    and label_numbers.find(given, classes) is None
    and all(labels.kind_of(x) == "integer" and numbering.find(x) is not None for x in given)
  )


def _prepare(
  run: load.Run,
  workdir: epath.PathLike,
  source: Source,
  out: str,
  classes: Sequence[str] = (),
) -> dict[str, Any]:
  """Prepares files. Returns the manifest. `classes` names what the labels number."""
  kinds = layouts.LAYOUTS[objectives.find(run.c).layout].kinds
  kind = source.kind or kinds[0]
  if kind not in kinds:
    raise UserError(
      f"--kind={kind}: objective.name={run.c.objective.name!r} is evaluated on data of kind "
      f"{' or '.join(kinds)}"
    )
  options: dict[str, Any] = {}
  if kind in ("chat", "preference") and run.generation.template_name:
    options["template"] = run.generation.template_name
  if kind == "classification" and run.c.model.num_labels == 1:
    options["labels"] = labels.NUMBERS
  elif classes:
    options["labels"] = json.dumps(classes)
  if kind == "text":
    options["cut_chars"] = 0
  return prepare.prepare(
    [str(source.data)],
    out,
    kind=kind,
    fields=source.fields,
    tokenizer=str(run_folder.tokenizer_folder(workdir)),
    validation=0,
    test=0,
    **options,
  )


def evaluate(
  run: load.Run,
  data: Opened,
  limit: int = 0,
  stride: int | None = None,
  show: Show = lambda done, total: None,
) -> tuple[dict[str, Any], Breakdown | None]:
  """Evaluates a run on all devices and processes.

  Args:
    run: From `load.load`.
    data: From `opened`.
    limit: Number of batches. 0: all.
    stride: Most predictions that a window scores after the first of a document, see `data.strided`.
      None: rows are packed as in training.
    show: Called with the number of batches done so far, and of all.

  Returns:
    (metrics, the scores behind them). The second is None for an objective whose predictions cannot
    be scored one by one, such as a preference or a regression.

  Raises:
    UserError: The stride does not suit the run.
  """
  c, batches = data.c, data.batches
  if stride is not None:
    batches = _strided(c, batches, stride)
  total = _num_batches(batches, limit, by_source=not scoring.has_scores(c))
  if not scoring.has_scores(c):
    step, begun = evaluation.make_step(run.parts.objective, run.mesh), itertools.count()

    def goes_on() -> bool:
      show(next(begun), total)
      return True

    with jax.set_mesh(run.mesh):
      result = evaluation.evaluate_on(batches, run.mesh, c.data, step, run.weights, limit, goes_on)
    return {**result, "data_digest": batches.digest}, None
  found = Breakdown(batches)
  show(0, total)
  for number, (rows, scores) in enumerate(score(run, c, batches, limit), 1):
    found.add(rows, scores)
    show(number, total)
  result = found.result(evaluation.bytes_per_token(batches))
  return {**result, "data_digest": batches.digest}, found


def _num_batches(batches: pipeline.Batches, limit: int, by_source: bool) -> int:
  """Batches of an evaluation.

  Args:
    batches: The data.
    limit: As in `evaluate`.
    by_source: Whether the sources of a mixture are evaluated one after another.
  """
  if 0 < limit < batches.steps_per_epoch:
    return limit
  if not by_source:
    return batches.steps_per_epoch
  return sum(-(-s.pack.num_rows // batches.batch_size) for s in batches.sources)


def score(
  run: load.Run, c: ml_collections.ConfigDict, batches: pipeline.Batches, limit: int = 0
) -> Iterator[tuple[list[tuple[int, int]], scoring.Scores]]:
  """Scores batches: for each its rows (source, row of the pack index) and its scores.

  Args:
    run: From `load.load`.
    c: The run's config, with the data.
    batches: The batches.
    limit: As in `evaluate`.
  """
  step = scoring.make_step(run.parts.model, run.mesh, c.objective.loss_chunk)
  some = 0 < limit < batches.steps_per_epoch
  with jax.set_mesh(run.mesh):
    on_devices = evaluation.held_out_batches(batches, run.mesh, c.data, limit)
    for number, scores in zip(itertools.count(), scoring.run(step, run.params, on_devices)):
      if some:
        yield [(row.source, row.row) for row in batches.rows(number)], scores
      else:
        yield batches.epoch_rows(number), scores


def by_contamination(run: load.Run, data: Opened, found: Breakdown, words: int) -> list[Row]:
  """A table of the evaluated documents: those that share words with the training data, and others.

  Args:
    run: From `load.load`.
    data: The data that was evaluated.
    found: From `evaluate`.
    words: Length of the runs of words that are compared.

  Raises:
    UserError: The run's training data is not known.
  """
  trained = contamination.of_training(run)
  examples, evaluated = found.examples(), list[str]()
  for number, s in enumerate(data.batches.sources):
    docs = examples.doc[examples.source == number]
    evaluated += contamination.texts(s.split, run.tokenizer, docs)
  config = decontaminate.Config(words=words)
  hit = contamination.shared(evaluated, trained, config)
  return found.by_group(hit.astype(np.int64), ("clean", f"shares {words} words"))


def gap(
  run: load.Run,
  workdir: epath.PathLike,
  loss: float,
  limit: int,
  stride: int | None = None,
  batch_size: int | None = None,
  show: Show = lambda done, total: None,
) -> dict[str, float]:
  """The generalization gap of a run.

  Args:
    run: From `load.load`.
    workdir: Its folder.
    loss: Its loss on the data that was evaluated.
    limit: Batches of the training split to compare with.
    stride, batch_size: Those with which the data was evaluated.
    show: See `evaluate`.

  Returns:
    {'train_loss', 'gap': loss minus train_loss}.

  Raises:
    UserError: The run's training data is not known.
  """
  if not run.c.data.path:
    raise UserError(
      "--gap: the run has no prepared training data, so there is nothing to compare with; leave it "
      "out"
    )
  with opened(run, workdir, Source(split="train"), batch_size) as data:
    result, _ = evaluate(run, data, limit, stride, show)
  return {"train_loss": result["loss"], "gap": loss - result["loss"]}


def _strided(
  c: ml_collections.ConfigDict, batches: pipeline.Batches, stride: int
) -> pipeline.Batches:
  layout = objectives.find(c).layout
  if layout != "causal_lm":
    raise UserError(
      f"--stride={stride} is for models that predict the next token, not for "
      f"objective.name={c.objective.name!r}; leave it out"
    )
  if not 0 < stride <= c.data.seq_len:
    raise UserError(
      f"--stride={stride} must be from 1 to the length of a row, data.seq_len={c.data.seq_len}"
    )
  return batches.laid_out(strided.StridedLM(stride))
