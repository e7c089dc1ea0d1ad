"""Text views of training steps and prepared folders: documents, rows and learned tokens."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import ml_collections
import numpy as np
from etils import epath
from numpy.typing import ArrayLike

from jaxgpt.data import layouts, pipeline, source, stages
from jaxgpt.data.batch_source import Batching
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.run import run_folder
from jaxgpt.text.prepare import shards
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib
from jaxgpt.training import batches as batches_lib


def inspect(
  folder: epath.PathLike,
  step: int,
  row: int | None = None,
  data: str | None = None,
  chars: int = 300,
) -> Iterator[str]:
  """Describes the batch of a training step of a run.

  Args:
    folder: The run folder.
    step: Number of the step. The first is 0. It may be in the future.
    row: Number of a row of the batch. None: all rows.
    data: The run's data folder. None: its folder at training.
    chars: Characters of each text to show. 0: all.

  Returns:
    An iterator of lines.

  Raises:
    UserError: There is no run or no such row, or the data is not the run's.
  """
  c = ml_collections.ConfigDict(run_folder.read_config(folder))
  c.data.path = data or c.data.path
  digest = run_folder.read_starts(folder)[0]["data_digest"]
  if not digest:
    raise UserError(f"{folder} was imported: its training steps are not known")
  if c.data.stream:
    raise UserError(
      f"{folder} was trained on data.stream={c.data.stream!r}: a stream has no random access, so "
      "the documents of a step are not known. Prepare the files with `jaxgpt data` and train on "
      "that folder to know them"
    )
  trained = batches_lib.training_data(c)
  batches = trained.at(step) if isinstance(trained, stages.StagedBatches) else trained
  assert isinstance(batches, pipeline.Batches)
  if row is not None and row >= batches.batch_size:
    raise UserError(f"--row={row}: the rows of a step are 0 to {batches.batch_size - 1}")
  load.check_data(batches, digest, c.data.path)
  tokenizer = tokenizer_lib.load(run_folder.tokenizer_folder(folder))
  seen = ", ".join(f"{name} {n:.2f}" for name, n in trained.epochs(step).items())
  head = (
    f"step {step} of {folder}: {batches.batch_size} rows of {batches.seq_len} places for "
    f"{c.objective.name}; epochs before it: {seen}"
  )
  wanted = range(batches.batch_size) if row is None else [row]
  return itertools.chain([head], _rows(batches, step, wanted, _Texts(tokenizer, chars)))


def show(
  path: str,
  split: str = "train",
  rows: int = 3,
  seed: int = 0,
  seq_len: int = 256,
  chars: int = 300,
) -> Iterator[str]:
  """Describes random rows of a prepared folder, packed as for training.

  Args:
    path: As `data.path`.
    split: Split to draw from.
    rows: Number of rows.
    seed: Seed of the draw.
    seq_len: Tokens per row.
    chars: As in `inspect`.

  Returns:
    An iterator of lines.

  Raises:
    UserError: There is no prepared folder, or the split is empty.
  """
  first = pipeline.check_sources(path)[0]
  kind = shards.read_manifest(first)["kind"]
  batches = pipeline.make(
    path,
    split,
    Batching(seq_len=seq_len, batch_size=rows, seed=seed),
    layout=layouts.of_kind(kind)[0],
  )
  tokenizer = tokenizer_lib.load(first)
  head = (
    f"{split} of {path}: {batches.num_documents:,} documents of kind {kind} in "
    f"{batches.len_rows:,} rows of {seq_len}"
  )
  return itertools.chain([head], _rows(batches, 0, range(rows), _Texts(tokenizer, chars)))


MARKS = "«»"  # around the tokens that a labelled example trains on


@dataclasses.dataclass(frozen=True)
class _Texts:
  """Lines that show tokens as text.

  Attributes:
    tokenizer: Decodes them.
    chars: Characters of each text to show. 0: all.
  """

  tokenizer: tokenizer_lib.Tokenizer
  chars: int

  def lines(self, ids: ArrayLike, learned: np.ndarray | None = None) -> Iterator[str]:
    """The text of the tokens, cut to `chars`, with each run of learned ones in `MARKS`."""
    ids = np.asarray(ids)
    if learned is None:
      text = self.tokenizer.decode(ids, specials=True)
    else:
      cuts = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
      runs = [
        (self.tokenizer.decode(ids[a:b], specials=True), learned[a])
        for a, b in itertools.pairwise(cuts)
        if a < b
      ]
      text = "".join(f"{MARKS[0]}{t}{MARKS[1]}" if is_learned else t for t, is_learned in runs)
    if self.chars and len(text) > self.chars:
      text = f"{text[: self.chars]}… ({len(text) - self.chars:,} more characters)"
    for line in text.split("\n"):
      yield f"    | {line}"

  def learned(self, word: str, targets: np.ndarray, has_weight: np.ndarray) -> str:
    """One line with the runs of targets that have a weight in the loss."""
    edges = np.flatnonzero(np.diff(has_weight, prepend=False, append=False))
    texts = [
      self.tokenizer.decode(targets[a:b], specials=True) for a, b in zip(edges[::2], edges[1::2])
    ]
    line = " ".join(map(repr, texts)) or "nothing"
    return (
      f"    {word}: {line[: self.chars] + '…' if self.chars and len(line) > self.chars else line}"
    )


def _rows(
  batches: pipeline.Batches, step: int, wanted: Iterable[int], texts: _Texts
) -> Iterator[str]:
  """Lines about the rows of a step's batch.

  A row holds spans of documents one after the other:

      row     | span of document 17   | span of document 4 | padding |
      length  | n0                    | n1                 |
  """
  arrays, rows = batches.batch(step), batches.rows(step)
  is_shifted = batches.layout.predicts_next
  for i in wanted:
    r = rows[i]
    name, split, pack, _ = batches.sources[r.source]
    spans = list(zip(*(a.tolist() for a in pack.spans(r.row))))
    used = sum(length for _, _, length in spans)
    yield ""
    yield (
      f"row {i}: {name}, epoch {r.epoch}, its row {r.row:,} of {pack.num_rows:,}; {used} places "
      f"filled{' in two texts' if 'query' in arrays else ''}"
    )
    if "chosen" in arrays:
      for span, side in zip(spans, ("chosen", "rejected")):
        yield from _span(split, span, _cut(arrays[side], i, 0, span[2]), side, True, texts)
    elif "query" in arrays:
      for number, side in enumerate(("query", "positive")):
        yield from _text(split, spans[0][0] + number, arrays[side], i, side, texts)
    elif "labels" in arrays:
      yield from _example(split, spans[0][0], _cut(arrays, i, 0, used), texts)
    elif "starts" in arrays:
      yield from _question(split, spans[0][0], _cut(arrays, i, 0, used), texts)
    elif split.kind == "tagging":
      at = 0
      for number, span in enumerate(spans, 1):
        yield from _tagged(split, span, _cut(arrays, i, at, at + span[2]), number, texts)
        at += span[2]
    else:
      at = 0
      for number, span in enumerate(spans, 1):
        here = _cut(arrays, i, at, at + span[2])
        yield from _span(split, span, here, f"segment {number}", is_shifted, texts)
        at += span[2]


def _cut(arrays: dict[str, np.ndarray], row: int, start: int, end: int) -> dict[str, np.ndarray]:
  """Positions start to end of a row, of each array of a batch."""
  return {key: x[row] if x.ndim == 1 else x[row, start:end] for key, x in arrays.items()}


def _span(
  split: source.Split,
  span: tuple[int, int, int],
  arrays: dict[str, np.ndarray],
  name: str,
  is_shifted: bool,
  texts: _Texts,
) -> Iterator[str]:
  """Lines about one span: its document, its text and the targets that the loss counts."""
  doc, start, length = span
  last = start + length if is_shifted else start + length - 1  # a shifted row has a target more
  yield (
    f"  {name}: {split.source_name(doc)} (document {doc}), tokens {start} to {last} "
    f"of {split.lengths[doc] + 1}"
  )
  has_weight = arrays["loss_weights"] > 0
  if is_shifted:
    ids = [*arrays["tokens"], arrays["targets"][-1]]
    labelled = split.trained(doc) is not None
    yield from texts.lines(ids, np.concatenate(([False], has_weight)) if labelled else None)
    if labelled or not has_weight.all():
      yield texts.learned("learned", arrays["targets"], has_weight)
  else:
    yield from texts.lines(arrays["tokens"])
    yield texts.learned("to guess", arrays["targets"], has_weight)


def _example(
  split: source.Split, doc: int, arrays: dict[str, np.ndarray], texts: _Texts
) -> Iterator[str]:
  """Lines about a labelled document: its label and its one or two texts."""
  if split.kind == "multi_label":
    named = ", ".join(_named(split, label) for label in split.classes(doc).tolist()) or "none"
    yield f"  {split.source_name(doc)} (document {doc}), labels {named}"
  else:
    yield f"  {split.source_name(doc)} (document {doc}), label {_named(split, split.labels[doc])}"
  for side in range(arrays["token_types"].max(initial=0) + 1):
    yield from texts.lines(arrays["tokens"][arrays["token_types"] == side])


def _named(split: source.Split, label: float) -> str:
  """A class with its number, or a number."""
  return (
    f"{split.label_names[int(label)]} (class {int(label)})" if split.label_names else str(label)
  )


def _text(
  split: source.Split,
  doc: int,
  arrays: dict[str, np.ndarray],
  row: int,
  side: str,
  texts: _Texts,
) -> Iterator[str]:
  """Lines about one text of a pair."""
  size, stored = int((arrays["segment_ids"][row] > 0).sum()), split.lengths[doc] + 1
  yield f"  {side}: {split.source_name(doc)} (document {doc}), {size} of {stored} tokens"
  yield from texts.lines(arrays["tokens"][row, :size])


def _question(
  split: source.Split, doc: int, arrays: dict[str, np.ndarray], texts: _Texts
) -> Iterator[str]:
  """Lines about a question, a window of its passage, and the answer that is learned there."""
  tokens, (start, end) = arrays["tokens"], (arrays[key].argmax() for key in ("starts", "ends"))
  found = texts.tokenizer.decode(tokens[start : end + 1])
  answer = repr(found) if start else "none in this window"
  yield f"  {split.source_name(doc)} (document {doc}), answer {answer}"
  for side in (0, 1):
    yield from texts.lines(tokens[arrays["token_types"] == side])


def _tagged(
  split: source.Split,
  span: tuple[int, int, int],
  arrays: dict[str, np.ndarray],
  number: int,
  texts: _Texts,
) -> Iterator[str]:
  """Lines about a text in words: each with its tag in brackets, as far as the row goes."""
  doc, start, length = span
  yield (
    f"  segment {number}: {split.source_name(doc)} (document {doc}), tokens {start} to "
    f"{start + length - 1} of {split.lengths[doc] + 1}"
  )
  firsts = np.flatnonzero(arrays["loss_weights"] > 0)
  words = []
  for first, end in zip(firsts, [*firsts[1:], length]):
    word = texts.tokenizer.decode(arrays["tokens"][first:end]).strip()
    words.append(f"{word} [{split.label_names[arrays['targets'][first]]}]")
  line = " ".join(words)
  yield f"    | {line[: texts.chars] + '…' if texts.chars and len(line) > texts.chars else line}"
