"""Which documents were in a step, with the text as the model saw it; and rows of a prepared folder."""

import itertools

import ml_collections
import numpy as np

from jaxgpt.data import layouts, pipeline
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.run import run_folder
from jaxgpt.text.prepare import shards
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib
from jaxgpt.training import batches as batches_lib


def inspect(folder, step, row=None, data=None, chars=300):
  """What a run saw, or will see, at a step.

  Args:
    folder: the run folder.
    step: the number of the step; the first is 0.
    row: a row of the batch; None: all of them.
    data: where the run's data is now; None: where it was.
    chars: of each text that are shown; 0: all.

  Returns:
    An iterator of lines.

  Raises:
    UserError: no run, no such row, or data that is not the run's.
  """
  c = ml_collections.ConfigDict(run_folder.read_config(folder))
  c.data.path = data or c.data.path
  digest = run_folder.read_starts(folder)[0]["data_digest"]
  if not digest:
    raise UserError(f"{folder} was imported: no step of it is known")
  if c.data.stream:
    raise UserError(
      f"{folder} was trained on data.stream={c.data.stream!r}, a stream, which has "
      "no random access: which documents were in a step is not known. Prepare the "
      "files with `jaxgpt data` and train on that folder to know it"
    )
  if row is not None and row >= c.data.batch_size:
    raise UserError(f"--row={row}: the rows of a step are 0 to {c.data.batch_size - 1}")
  batches = batches_lib.split_batches(c, "train")
  load.check_data(batches, digest, c.data.path)
  tokenizer = tokenizer_lib.load(run_folder.tokenizer_folder(folder))
  seen = ", ".join(f"{name} {n:.2f}" for name, n in batches.epochs(step).items())
  head = (
    f"step {step} of {folder}: {c.data.batch_size} rows of {c.data.seq_len} places for "
    f"{c.objective.name}; epochs before it: {seen}"
  )
  wanted = range(c.data.batch_size) if row is None else [row]
  return itertools.chain([head], _rows(batches, step, wanted, tokenizer, chars))


def show(path, split="train", rows=3, seed=0, seq_len=256, chars=300):
  """Rows of a prepared folder, drawn at random and packed as for training.

  Args:
    path: as `data.path`.
    split: which documents.
    rows: how many.
    seed: of the draw.
    seq_len: places in a row.
    chars: as in `inspect`.

  Returns:
    An iterator of lines.

  Raises:
    UserError: no prepared folder, or an empty split.
  """
  first = pipeline.check_sources(path)[0]
  kind = shards.read_manifest(first)["kind"]
  batches = pipeline.make(
    path,
    split,
    seq_len=seq_len,
    batch_size=rows,
    seed=seed,
    layout=layouts.of_kind(kind)[0],
  )
  tokenizer = tokenizer_lib.load(first)
  head = (
    f"{split} of {path}: {batches.num_documents:,} documents of kind {kind} in "
    f"{batches.len_rows:,} rows of {seq_len}"
  )
  return itertools.chain([head], _rows(batches, 0, range(rows), tokenizer, chars))


def _rows(batches, step, wanted, tokenizer, chars):
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
      "filled"
    )
    if "chosen" in arrays:
      for span, side in zip(spans, ("chosen", "rejected")):
        part = _at(arrays[side], i, 0, span[2])
        yield from _span(split, span, part, side, True, tokenizer, chars)
    elif "labels" in arrays:
      yield from _example(split, spans, _at(arrays, i, 0, used), tokenizer, chars)
    else:
      at = 0
      for number, span in enumerate(spans, 1):
        part = _at(arrays, i, at, at + span[2])
        yield from _span(split, span, part, f"segment {number}", is_shifted, tokenizer, chars)
        at += span[2]


def _at(arrays, i, start, end):
  return {key: x[i] if x.ndim == 1 else x[i, start:end] for key, x in arrays.items()}


def _span(split, span, part, name, is_shifted, tokenizer, chars):
  """Lines about one span: where it is from, its text, and what of it is learned."""
  doc, start, length = span
  yield (
    f"  {name}: {split.source_name(doc)} (document {doc}), tokens {start} to {start + length} "
    f"of {split.lengths[doc] + 1}"
  )
  learned = part["loss_weights"] > 0
  if is_shifted:
    yield from _text([*part["tokens"], part["targets"][-1]], tokenizer, chars)
    if not learned.all():
      yield from _learned("learned", part["targets"], learned, tokenizer, chars)
  else:
    yield from _text(part["tokens"], tokenizer, chars)
    yield from _learned("to guess", part["targets"], learned, tokenizer, chars)


def _example(split, spans, part, tokenizer, chars):
  doc = spans[0][0]
  label = split.labels[doc].item()
  named = f"{split.label_names[int(label)]} (class {int(label)})" if split.label_names else label
  yield f"  {split.source_name(doc)} (document {doc}), label {named}"
  for side in range(part["token_types"].max(initial=0) + 1):
    yield from _text(part["tokens"][part["token_types"] == side], tokenizer, chars)


def _text(ids, tokenizer, chars):
  text = tokenizer.decode(ids, specials=True)
  if chars and len(text) > chars:
    text = f"{text[:chars]}… ({len(text) - chars:,} more characters)"
  for line in text.split("\n"):
    yield f"    | {line}"


def _learned(what, targets, learned, tokenizer, chars):
  """The runs of targets that have a weight."""
  edges = np.flatnonzero(np.diff(learned, prepend=False, append=False))
  texts = [tokenizer.decode(targets[a:b], specials=True) for a, b in zip(edges[::2], edges[1::2])]
  line = " ".join(map(repr, texts)) or "nothing"
  yield f"    {what}: {line[:chars] + '…' if chars and len(line) > chars else line}"
