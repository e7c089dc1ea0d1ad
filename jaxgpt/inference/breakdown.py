"""Evaluation results in detail: by source, by position in the context, by length of the document.

A `Breakdown` collects the scores of batches on the host, in double precision. Its memory is
proportional to the documents that were scored, and its tables are bounded.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt.data import pipeline
from jaxgpt.inference.scoring import Scores
from jaxgpt.run.process import text_table
from jaxgpt.training import evaluation, metrics

MOST_SOURCES = 20  # rows of the table by source
_FIRST_POSITION, _FIRST_LENGTH = 16, 64  # upper ends of the first rows; further ones double
_CONFIDENCES = 15  # equal bins of `calibration`
_NUMBERS = re.compile(r"(:[0-9]+)?(#[0-9]+)?\Z")  # of a document in its file, and of its piece
_MERGED = 64  # batches whose documents are merged at a time

Row = dict[str, Any]


class Examples(NamedTuple):
  """The documents that were scored, in the order of the data.

  Attributes:
    source: Index of each document's source.
    doc: Its number in the source's split.
    weight, nll, correct: Sums over its predictions.
  """

  source: np.ndarray
  doc: np.ndarray
  weight: np.ndarray
  nll: np.ndarray
  correct: np.ndarray


class Breakdown:
  """Scores of a split, added batch by batch.

  Example:
    >>> found = Breakdown(data)
    >>> for rows, scores in ...:
    ...   found.add(rows, scores)
    >>> found.result(), found.tables()
  """

  def __init__(self, data: pipeline.Batches):
    """Args: data: The batches that are scored."""
    self._data, self._pending = data, list[Examples]()
    positions = _bin(np.array([max(data.seq_len - 1, 0)]), _FIRST_POSITION)[0] + 1
    self._positions = np.zeros((3, positions))
    self._confidences = np.zeros((3, _CONFIDENCES))
    self._counts: np.ndarray | None = None  # of `evaluation.COUNTS`, where rows have several labels
    self._has_rows = False  # one prediction per row
    self._of_tokens = data.layout.predicts_tokens  # so that there is a perplexity

  def add(self, rows: Sequence[tuple[int, int]], scores: Scores) -> None:
    """Adds a batch.

    Args:
      rows: (source, row of its pack index) of the batch's first rows. The others are padding.
      scores: Of the batch, from `scoring.run`.
    """
    self._has_rows = scores.weight.ndim == 1
    parts = [self._data.sources[s].pack.spans(row) for s, row in rows]
    if self._has_rows:
      counts = [1] * len(rows)
      docs = [part[0][:1] for part in parts]
      flat = jax.tree.map(lambda x: np.asarray(x[: len(rows)], np.float64), scores)
    else:
      counts = [int(part[2].sum()) for part in parts]
      docs = [np.repeat(part[0], part[2]) for part in parts]
      joined = lambda x: np.concatenate([[], *(x[i, :n] for i, n in enumerate(counts))])
      flat = jax.tree.map(joined, scores)
      at = [np.arange(n) - np.repeat(np.cumsum(p[2]) - p[2], p[2]) for n, p in zip(counts, parts)]
      where = _bin(np.concatenate([[], *at]).astype(np.int64), _FIRST_POSITION)
      self._positions += _sums(where, flat, self._positions.shape[1])
    source = np.repeat(np.array([s for s, _ in rows], np.int64), counts)
    doc = np.concatenate([np.empty(0, np.int64), *docs]).astype(np.int64)
    self._add_confidences(flat)
    self._pending.append(
      Examples(source, doc, flat.weight, flat.nll * flat.weight, flat.correct * flat.weight)
    )
    if len(self._pending) >= _MERGED:
      self._pending = [_merged(self._pending)]

  def _add_confidences(self, flat: Scores) -> None:
    """Adds to the bins of `calibration_error` and to the counts of classes."""
    weight, right, sure = flat.weight, flat.correct, flat.confidence
    if flat.labels is not None:
      has, predicted = flat.labels
      counts = np.array([x.sum(-1) @ weight for x in (has * predicted, predicted, has)])
      self._counts = counts + (0 if self._counts is None else self._counts)
      weight, right = np.repeat(weight, sure.shape[1]), (has == predicted).reshape(-1)
      sure = sure.reshape(-1)
    sure = np.nan_to_num(sure)  # weights that give NaN: the loss says it
    where = np.minimum((sure * _CONFIDENCES).astype(np.int64), _CONFIDENCES - 1)
    for row, x in zip(self._confidences, (1, sure, right)):
      row += np.bincount(where, weight * x, _CONFIDENCES)

  def examples(self) -> Examples:
    """The documents with at least one prediction that was scored."""
    self._pending = [_merged(self._pending)]
    found = self._pending[0]
    scored = found.weight > 0
    return Examples(*(x[scored] for x in found))

  def result(self, bytes_per_token: float | None) -> dict[str, float]:
    """The metrics of all predictions, as `evaluation.evaluate` has them.

    Args:
      bytes_per_token: As there.

    Returns:
      Also 'accuracy', and of classes 'calibration_error' (see `calibration_error`).
    """
    found = self.examples()
    out = _means(found.weight.sum(), found.nll.sum(), found.correct.sum(), self._of_tokens)
    if self._counts is not None:
      out |= evaluation.micro_f1(dict(zip(evaluation.COUNTS, self._counts.tolist(), strict=True)))
    if not self._of_tokens:
      out["calibration_error"] = calibration_error(self._confidences)
    if bytes_per_token is not None:
      out["bits_per_byte"] = metrics.bits_per_byte(out["loss"], bytes_per_token)
    out |= {"tokens": out.pop("predictions")}
    if len(self._data.sources) > 1:
      out |= {f"loss/{row['name']}": row["loss"] for row in self._by_folder(found)}
    return out

  def tables(self) -> dict[str, list[Row]]:
    """{'source', 'position', 'length': rows with 'name', 'predictions', 'loss', …}.

    Sources are the prepared folders of a mixture, or else the files of the only one. If these are
    more than `MOST_SOURCES`, they are reported by folder, or else the largest ones. A classifier,
    which predicts once per row, has no table by position.
    """
    found = self.examples()
    out = {"source": self._by_source(found)}
    if not self._has_rows:
      out["position"] = list(self._rows(self._positions, _FIRST_POSITION))
    lengths = np.zeros(len(found.doc), np.int64)
    for number, s in enumerate(self._data.sources):
      here = found.source == number
      lengths[here] = s.split.lengths[found.doc[here]]
    where = _bin(lengths, _FIRST_LENGTH)
    out["length"] = list(self._table(where, found, _FIRST_LENGTH))
    return out

  def by_group(self, where: np.ndarray, names: Sequence[str]) -> list[Row]:
    """A table by groups of the documents.

    Args:
      where: The group of each document of `examples`.
      names: Names of the groups.
    """
    return list(self._named(where, self.examples(), names))

  def _by_folder(self, found: Examples) -> list[Row]:
    names = [s.name for s in self._data.sources]
    return list(self._named(found.source, found, names))

  def _by_source(self, found: Examples) -> list[Row]:
    if len(self._data.sources) > 1:
      return self._by_folder(found)
    split = self._data.sources[0].split
    files = [_file(name) for name in split.source_names(found.doc.tolist())]
    depths = range(max((name.count("/") for name in files), default=0), 0, -1)
    folders = (["/".join(name.split("/")[:depth]) for name in files] for depth in depths)
    if len(set(files)) > MOST_SOURCES:
      files = next((f for f in folders if 1 < len(set(f)) <= MOST_SOURCES), files)
    found_names, where = np.unique(np.array(files, object), return_inverse=True)
    names = [str(name) for name in found_names]
    if len(names) > MOST_SOURCES:
      # The files with the most predictions, and the rest together.
      sizes = np.bincount(where, found.weight)
      kept = np.sort(np.argsort(-sizes, kind="stable")[: MOST_SOURCES - 1])
      number = np.full(len(names), len(kept))
      number[kept] = np.arange(len(kept))
      where = number[where]
      names = [*(names[i] for i in kept), f"{len(names) - len(kept)} other files"]
    return list(self._named(where, found, names))

  def _named(self, where: np.ndarray, found: Examples, names: Sequence[str]) -> Iterator[Row]:
    sums = _sums_of_examples(where, found, len(names))
    documents = np.bincount(where, minlength=len(names))
    for name, count, (weight, nll, correct) in zip(names, documents.tolist(), sums.T.tolist()):
      if count:
        means = _means(weight, nll, correct, self._of_tokens)
        yield {"name": name, "documents": count} | means

  def _table(self, where: np.ndarray, found: Examples, first: int) -> Iterator[Row]:
    size = int(where.max(initial=0)) + 1
    names = [_range(i, first) for i in range(size)]
    yield from self._named(where, found, names)

  def _rows(self, sums: np.ndarray, first: int) -> Iterator[Row]:
    for i, (weight, nll, correct) in enumerate(sums.T.tolist()):
      if weight:
        yield {"name": _range(i, first)} | _means(weight, nll, correct, self._of_tokens)


def calibration_error(bins: np.ndarray) -> float:
  """The expected calibration error, in [0, 1] (arXiv:1706.04599, equation 3).

    ECE = sum over bins of n_b / n * |accuracy of the bin - mean confidence of the bin|

  Where rows have several labels, each class of a row is a prediction: yes or no.

  Args:
    bins: [3, bins]: predictions, the sum of their confidences, and the number of correct ones.
  """
  weight, confidence, correct = bins
  return float(np.abs(correct - confidence).sum() / max(weight.sum(), 1))


def _merged(parts: Sequence[Examples]) -> Examples:
  """Adds up the sums of each document."""
  if not parts:
    empty = np.empty(0)
    return Examples(empty.astype(np.int64), empty.astype(np.int64), empty, empty, empty)
  source, doc, *sums = (np.concatenate(x) for x in zip(*parts))
  order = np.lexsort((doc, source))
  source, doc = source[order], doc[order]
  changes = (np.diff(source, prepend=-1) != 0) | (np.diff(doc, prepend=-1) != 0)
  starts = np.flatnonzero(changes)
  if not len(starts):
    return Examples(source, doc, *sums)
  return Examples(source[starts], doc[starts], *(np.add.reduceat(x[order], starts) for x in sums))


def _bin(x: np.ndarray, first: int) -> np.ndarray:
  """0 for x < first, 1 for x < 2 * first, 2 for x < 4 * first, …"""
  return np.ceil(np.log2(np.maximum(x + 1, first) / first)).astype(np.int64)


def _range(i: int, first: int) -> str:
  return f"{0 if i == 0 else first << (i - 1)}-{(first << i) - 1}"


def _sums(where: np.ndarray, flat: Scores, size: int) -> np.ndarray:
  w = flat.weight
  return np.stack([np.bincount(where, w * x, size) for x in (1, flat.nll, flat.correct)])


def _sums_of_examples(where: np.ndarray, found: Examples, size: int) -> np.ndarray:
  return np.stack([np.bincount(where, x, size) for x in (found.weight, found.nll, found.correct)])


def _means(weight: float, nll: float, correct: float, per_token: bool) -> Row:
  loss = float(nll) / max(weight, 1)
  perplexity = {"perplexity": metrics.perplexity(loss)} if per_token else {}
  accuracy = float(correct) / max(weight, 1)
  return {"loss": loss} | perplexity | {"accuracy": accuracy, "predictions": int(weight)}


def _file(source: str) -> str:
  """The file of a document's origin: 'a/b.jsonl' of 'a/b.jsonl:12' and of its piece '…:12#3'."""
  return _NUMBERS.sub("", source)


def text(tables: dict[str, list[Row]]) -> list[str]:
  """Lines that show the tables, with aligned columns."""
  lines = []
  for title, rows in tables.items():
    keys = [key for key in (rows[0] if rows else {}) if key != "name"]
    head = [f"by {title}", *keys]
    cells = [[str(row["name"]), *(_cell(row[key]) for key in keys)] for row in rows]
    lines += [*text_table.lines(head, cells), ""]
  return lines[:-1]


def _cell(x: Any) -> str:
  if isinstance(x, int):
    return f"{x:,}"
  return "inf" if math.isinf(x) else f"{x:.4f}"
