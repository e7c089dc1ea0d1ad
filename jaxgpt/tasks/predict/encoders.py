"""Predictions of models that read a text and say something about it.

An example becomes rows of the layout that its model was trained on: one, or several if it is long.
The outputs of these rows are put together again.

B rows, T tokens, C classes, D width.
"""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt.data import layouts
from jaxgpt.data.layouts.layout import Item, Layout, Spans
from jaxgpt.data.memory import MemorySplit
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.model import transformer
from jaxgpt.run import label_names
from jaxgpt.tasks.metrics import entities
from jaxgpt.tasks.predict import batching
from jaxgpt.tasks.predict.devices import Devices
from jaxgpt.tasks.predict.protocol import Prediction, Settings
from jaxgpt.tasks.predict.rows import Row
from jaxgpt.text.readers.documents import Document
from jaxgpt.text.tokenizers import examples, passages, tagged_words
from jaxgpt.text.tokenizers.encoded import Encoded
from jaxgpt.training import objectives
from jaxgpt.training.objectives import contrastive, question_answering
from jaxgpt.tree import PyTree

_DIGITS = 6  # of probabilities
_OUTSIDE = "O"  # the tag of a word in no entity


class Example(NamedTuple):
  """A row as tokens.

  Attributes:
    encoded: Its stored documents.
    words: What leads from tokens back to the row: `tagged_words.Words` or `passages.Passage`.
  """

  encoded: list[Encoded]
  words: Any = None


class Part(NamedTuple):
  """A row of the layout: the spans of the documents that it holds, and the model's outputs."""

  spans: Spans
  outputs: Any


class Encoder(abc.ABC):
  """The base of these predictors. Subclasses say what an example is and what its outputs mean."""

  def __init__(self, run: load.Run, kind: str, settings: Settings):
    """Args: run: From `load.load`. kind: Kind of the rows. settings: See `Settings`."""
    self.kind, self._run = kind, run
    self.use(settings)
    self._devices = Devices(run.mesh)
    self._layout = self._make_layout()
    self._names = self._class_names()
    is_regression = kind == "classification" and run.c.model.num_labels == 1
    self.classes: Sequence[str] = () if is_regression else self._names
    self._compiled = self._devices.jit(self._forward)

  def use(self, settings: Settings) -> None:
    """See `Predictor`."""
    settings.sampling.check()
    if settings.constraint:
      raise UserError(
        f"{settings.constraint.kind}: the form of a text is for models that write texts, and this "
        "one does not; leave it out"
      )
    self._settings = settings

  def _make_layout(self) -> Layout:
    """The layout of training."""
    c = self._run.c
    inputs = layouts.Inputs(num_labels=c.model.num_labels, overlap=c.data.overlap)
    return layouts.LAYOUTS[objectives.find(c).layout].make(inputs)

  def _class_names(self) -> list[str]:
    c = self._run.c
    own = list(label_names.of_run(c, self._run.data_digest))
    return own or [str(i) for i in range(c.model.num_labels)]

  def _forward(self, params: PyTree, batch: PyTree) -> Any:
    """The outputs of a batch: a tree of arrays [B, …]. It is compiled."""
    return self._apply(params, batch).logits

  def _apply(self, params: PyTree, batch: PyTree) -> Any:
    model: Any = transformer.dropless(self._run.parts.model)
    types = batch.get("token_types")
    return model.apply(
      {"params": params},
      batch["tokens"],
      batch["positions"],
      batch["segment_ids"],
      token_types_BT=types,
    )

  @abc.abstractmethod
  def _encode(self, rows: Sequence[Row]) -> list[Example]:
    """Encodes rows as training data is, with stand-ins for their answers.

    Raises:
      UserError: One of them cannot be encoded.
    """

  @abc.abstractmethod
  def _prediction(self, row: Row, example: Example, parts: Sequence[Part]) -> Prediction:
    """What the outputs of a row's parts say."""

  def _documents(self, rows: Sequence[Row], **answer: Any) -> list[Example]:
    """Encodes rows of a kind whose tokens need no way back."""
    documents = [Document(row.where, "", row.id, {**row.fields, **answer}) for row in rows]
    names = self._run.c.model.label_names
    found = examples.encode_batch(documents, self.kind, self._run.tokenizer, label_names=names)
    out = []
    for one in found:
      if isinstance(one, UserError):
        raise one
      out.append(Example(one))
    return out

  def _or_errors(self, rows: Sequence[Row]) -> list[Example | UserError]:
    """Encodes rows in one call, or in smaller ones if that fails for one of them."""
    try:
      found = self._encode(rows)
      for example in found:
        for encoded in example.encoded:
          self._run.tokenizer.check_rows(encoded.ids, self._run.c.model.vocab_size)
      return [*found]
    except UserError as e:
      if len(rows) == 1:
        return [e]
      half = len(rows) // 2
      return self._or_errors(rows[:half]) + self._or_errors(rows[half:])

  def __call__(
    self, params: PyTree, rows: Sequence[Row], chunk: int = 0
  ) -> list[Prediction | UserError]:
    """See `Predictor`. Nothing is drawn at random."""
    del chunk
    if not rows:
      return []
    found = self._or_errors(rows)
    encoded, owner = list[Encoded](), list[int]()  # documents, and the row of each
    for i, example in enumerate(found):
      if isinstance(example, Example):
        encoded += example.encoded
        owner += [i] * len(example.encoded)
    parts: dict[int, list[Part]] = {}
    for part in self._outputs(params, encoded):
      parts.setdefault(owner[int(part.spans[0][0])], []).append(part)
    return [
      e if isinstance(e, UserError) else self._prediction(row, e, parts[i])
      for i, (row, e) in enumerate(zip(rows, found, strict=True))
    ]

  def _outputs(self, params: PyTree, encoded: Sequence[Encoded]) -> list[Part]:
    """The outputs of documents, in the order of the layout's rows."""
    if not encoded:
      return []
    longest, s = self._run.c.data.seq_len, self._settings
    split: Any = MemorySplit(encoded, self.kind, self._run.c.model.label_names)
    pack, _ = self._layout.index(split, "one_per_row", longest)
    lengths = np.add.reduceat(pack.length, pack.row_offsets[:-1]).tolist()
    out: list[Any] = [None] * len(lengths)
    done = 0
    with jax.set_mesh(self._devices.mesh):
      for step in batching.steps(lengths, s.rows, self._devices.shards, longest):
        batches = [
          self._layout.batch([Item(split, pack, i, i) for i in numbers], s.rows, step.length)
          for numbers in step.batches
        ]
        batch = jax.tree.map(lambda *xs: np.concatenate(xs), *batches)
        result = self._devices.get(self._compiled(params, self._devices.put(batch)))
        for shard, numbers in enumerate(step.batches):
          for place, i in enumerate(numbers):
            at = shard * s.rows + place
            out[i] = Part(pack.spans(i), jax.tree.map(lambda x, at=at: x[at], result))
        done += sum(map(len, step.batches))
        s.tell(done / len(lengths))
    return out


class Classes(Encoder):
  """A class with the probabilities of all, or the value of a regression."""

  def _encode(self, rows: Sequence[Row]) -> list[Example]:
    names = self._run.c.model.label_names
    return self._documents(rows, label=names[0] if names else 0)

  def _prediction(self, row: Row, example: Example, parts: Sequence[Part]) -> Prediction:
    logits_C = parts[0].outputs
    if len(logits_C) == 1:
      return {"value": rounded(logits_C[0])}
    logits_C = logits_C[: len(self._names)]  # outputs beyond the classes are not used
    of = zip(self._names, softmax(logits_C), strict=True)
    return {
      "label": self._names[int(logits_C.argmax())],
      "probabilities": {name: rounded(p) for name, p in of},
    }


class LabelSets(Encoder):
  """The classes whose probability is above 1/2, with the probabilities of all."""

  def _encode(self, rows: Sequence[Row]) -> list[Example]:
    return self._documents(rows, labels=[])

  def _prediction(self, row: Row, example: Example, parts: Sequence[Part]) -> Prediction:
    logits_C = np.asarray(parts[0].outputs, np.float64)[: len(self._names)]
    probs_C = np.exp(-np.logaddexp(0, -logits_C))
    of = list(zip(self._names, logits_C, probs_C, strict=True))
    return {
      "labels": [name for name, x, _ in of if x > 0],
      "probabilities": {name: rounded(p) for name, _, p in of},
    }


class Tags(Encoder):
  """A tag for each word, by the word's first token, and the entities of the tags."""

  def _encode(self, rows: Sequence[Row]) -> list[Example]:
    found = tagged_words.encode([row.fields["words"] for row in rows], self._run.tokenizer)
    out = []
    for words in found:
      firsts = words.firsts[words.firsts != tagged_words.NO_TOKEN]
      tags = np.stack((firsts, 0 * firsts), axis=1).astype(np.int32)
      out.append(Example([Encoded(words.ids, tags=tags)], words))
    return out

  def _prediction(self, row: Row, example: Example, parts: Sequence[Part]) -> Prediction:
    best = dict[int, int]()  # stored token -> its class
    for (_, starts, lengths), logits_TC in parts:
      at = 0
      for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        classes = logits_TC[at : at + length, : len(self._names)].argmax(-1)
        best.update(zip(range(start, start + length), classes.tolist(), strict=True))
        at += length
    # A word without a token of its own has no output.
    tags = [
      _OUTSIDE if first == tagged_words.NO_TOKEN else self._names[best[first]]
      for first in example.words.firsts.tolist()
    ]
    words = row.fields["words"]
    return {
      "tags": tags,
      "entities": [
        {**entity._asdict(), "text": " ".join(words[entity.start : entity.end])}
        for entity in entities.entities(tags)
      ],
    }


class Answers(Encoder):
  """The answer to a question: the best span over the windows of its passage.

  The span [i, j] of a window scores start_i + end_j. The first token of a row stands for no answer
  (BERT, arXiv:1810.04805, section 4.3). A window without the answer prefers it too, so the lowest
  score of no answer over the windows is compared with the best span.
  """

  def _encode(self, rows: Sequence[Row]) -> list[Example]:
    pairs = [(row.fields["question"], row.fields["context"]) for row in rows]
    none = np.empty((0, 2), np.int32)
    return [
      Example([Encoded(found.ids, second=found.second, answers=none)], found)
      for found in passages.encode(pairs, self._run.tokenizer)
    ]

  def _prediction(self, row: Row, example: Example, parts: Sequence[Part]) -> Prediction:
    passage, last = example.words, len(example.words.ids) - 1
    none, best = np.inf, (-np.inf, 0, 0, 0.0)  # score, first and last stored token, probability
    for (_, starts, lengths), logits_T2 in parts:
      count = int(lengths.sum())
      x_T2 = np.asarray(logits_T2[:count], np.float64)
      none = min(none, x_T2[0].sum())
      stored_T = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
      inside = (stored_T >= passage.second) & (stored_T < last)
      best = max(best, *_spans(x_T2, inside, stored_T))
    score, start, end, probability = best
    if not np.isfinite(score) or none > score:
      return {"answer": "", "start": None, "end": None, "score": rounded(none_share(none, score))}
    low, high = passage.characters(start, end + 1)
    answer = row.fields["context"][low:high]
    # A token may hold the space before its word.
    low, high = low + len(answer) - len(answer.lstrip()), high - len(answer) + len(answer.rstrip())
    return {
      "answer": answer.strip(),
      "start": low,
      "end": high,
      "score": rounded(probability),
    }


def none_share(none: float, score: float) -> float:
  """The probability of no answer against the best one."""
  return float(np.exp(-np.logaddexp(0, min(score - none, 700))))


def _spans(
  x_T2: np.ndarray, inside_T: np.ndarray, stored_T: np.ndarray
) -> list[tuple[float, int, int, float]]:
  """The best span of a window, as a list of at most one.

  Args:
    x_T2: Logits.
    inside_T: Whether a token is of the passage.
    stored_T: The stored token of each.

  Returns:
    [(score, its first and last stored token, its probability in the window)].
  """
  places = np.flatnonzero(inside_T)
  if not len(places):
    return [(-np.inf, 0, 0, 0.0)]
  start_T, end_T = x_T2[places, question_answering.START], x_T2[places, question_answering.END]
  # For each end, the best start at or before it.
  highest_T = np.maximum.accumulate(start_T)
  end = int((highest_T + end_T).argmax())
  start = int(start_T[: end + 1].argmax())
  probs_2T = softmax(x_T2.T)
  first, last = places[start], places[end]
  probability = probs_2T[question_answering.START, first] * probs_2T[question_answering.END, last]
  score = float(start_T[start] + end_T[end])
  return [(score, int(stored_T[first]), int(stored_T[last]), float(probability))]


class Embeddings(Encoder):
  """The embedding of a text, and that of its passage if the row has one."""

  def _make_layout(self) -> Layout:
    # A text for itself, cut as in training: that of `layouts.Retrieval` has pairs.
    return layouts.LAYOUTS["classification"].make(layouts.Inputs())

  def _forward(self, params: PyTree, batch: PyTree) -> Any:
    out = self._apply(params, batch)
    return contrastive.embeddings(self._run.parts.model, out.logits, batch)

  def _encode(self, rows: Sequence[Row]) -> list[Example]:
    # A row without a passage gets its query in place of it, which is then left out.
    found = self._documents(
      [row._replace(fields={"positive": row.fields["query"], **row.fields}) for row in rows]
    )
    return [
      example if "positive" in row.fields else Example(example.encoded[:1])
      for row, example in zip(rows, found, strict=True)
    ]

  def _prediction(self, row: Row, example: Example, parts: Sequence[Part]) -> Prediction:
    names = ("embedding", "positive_embedding")
    return {
      name: [rounded(x) for x in part.outputs] for name, part in zip(names, parts, strict=False)
    }


def softmax(logits: np.ndarray) -> np.ndarray:
  """Probabilities over the last axis, in double precision."""
  x = np.asarray(logits, np.float64)
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def rounded(value: Any) -> float:
  """A number for a file of predictions."""
  return round(float(value), _DIGITS)
