"""Tasks: which metrics a kind of application reports, and its baseline.

A task is one object: an entry of `TASKS`, or an object of a user's file, FILE.py:NAME. It sees rows
with their answers (`readers.kinds.KINDS`) and predictions (`predict.registry`), so the same object
scores a file, a run in training, and the predictions of another program.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from jaxgpt.config import user_code
from jaxgpt.config.registry import Registry
from jaxgpt.errors import UserError
from jaxgpt.tasks.bootstrap import Measure
from jaxgpt.tasks.metrics import answers, classes, entities, overlap, ranking
from jaxgpt.tasks.predict.protocol import Prediction
from jaxgpt.text.tokenizers import labels

Fields: TypeAlias = Mapping[str, Any]  # the columns of a row by name
Measures: TypeAlias = dict[str, Measure]


@dataclasses.dataclass(frozen=True)
class Task:
  """A task.

  Attributes:
    kinds: Kinds of rows that it scores, with the column that holds the answer.
    measures: (rows, a prediction for each) -> its metrics. The first is the main one. A row that
      could not be predicted has the prediction {}.
    baseline: (rows) -> the predictions of a baseline.
    baseline_name: A few words on the baseline, such as 'majority class'.
    details: (rows, predictions) -> further lines of a report.
    summary: A few words for the documentation.
    numbers: Whether the labels of classification are numbers, and not classes. A row without a
      prediction is then left out, since no number is wrong for sure. None: the task takes both.
    problem: (row, its prediction) -> the reason why the metrics can't read the prediction, which
      another program may have written, or ''.
  """

  kinds: Mapping[str, str]
  measures: Callable[[Sequence[Fields], Sequence[Prediction]], Measures]
  baseline: Callable[[Sequence[Fields]], list[Prediction]]
  baseline_name: str
  details: Callable[[Sequence[Fields], Sequence[Prediction]], list[str]] = lambda rows, found: []
  summary: str = ""
  numbers: bool | None = None
  problem: Callable[[Fields, Prediction], str] = lambda row, prediction: ""

  def check_kind(self, kind: str) -> None:
    """Raises a UserError if the task does not score rows of a kind."""
    if kind not in self.kinds:
      raise UserError(
        f"this task scores rows of kind {' or '.join(self.kinds)}, but the model predicts for rows "
        f"of kind {kind}; choose another task"
      )


TASKS: Registry[Task] = Registry("task.name")


def find(name: str, folder: str = "") -> Task:
  """The task of a name: an entry of `TASKS`, or FILE.py:NAME.

  Args:
    name: The name.
    folder: The folder that FILE.py is relative to.

  Raises:
    UserError: There is none.
  """
  return user_code.find(TASKS, Task, name, folder or ".")


def _is_name(value: Any) -> bool:
  return isinstance(value, str | int | float)


def _is_number(value: Any) -> bool:
  return labels.kind_of(str(value)) != "text"


def _is_vector(value: Any) -> bool:
  return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _form(column: str, is_right: Callable[[Any], bool], what: str) -> Callable[..., str]:
  """A `Task.problem`: `column` is not there, or not `what`."""

  def problem(row: Fields, prediction: Prediction) -> str:
    del row
    if column not in prediction:
      return f"a prediction of this task has a {column!r}, and this one has none"
    value = prediction[column]
    return "" if is_right(value) else f"{column!r} is {str(value)[:50]!r}, not {what}"

  return problem


_of_text = _form("text", lambda x: isinstance(x, str), "a text")


def _labels(rows: Sequence[Fields], found: Sequence[Prediction]) -> tuple[list[str], list[str]]:
  return [str(p.get("label", "")) for p in found], [str(row["label"]) for row in rows]


def _majority(rows: Sequence[Fields]) -> list[Prediction]:
  counts = collections.Counter(str(row["label"]) for row in rows)
  return [{"label": counts.most_common(1)[0][0]}] * len(rows)


def _classification(rows: Sequence[Fields], found: Sequence[Prediction]) -> Measures:
  predicted, wanted = _labels(rows, found)
  return {
    "accuracy": classes.accuracy(predicted, wanted),
    "macro_f1": classes.macro_f1(predicted, wanted),
  }


def _confusion(rows: Sequence[Fields], found: Sequence[Prediction]) -> list[str]:
  matrix = classes.confusion(*_labels(rows, found))
  if len(matrix.names) > 20:
    return []
  return ["confusion matrix (row: class, column: prediction)", *matrix.lines()]


TASKS.add(
  "sentiment",
  Task(
    {"classification": "label"},
    _classification,
    _majority,
    "majority class",
    _confusion,
    "classes of a text: accuracy, macro-F1, confusion matrix",
    numbers=False,
    problem=_form("label", _is_name, "the name of a class"),
  ),
)


def _numbers(rows: Sequence[Fields], found: Sequence[Prediction]) -> Measures:
  wanted = [float(row["label"]) for row in rows]
  predicted = [float(p["value"]) for p in found]
  return {
    "pearson": classes.pearson(predicted, wanted),
    "mean_squared_error": classes.mean_squared_error(predicted, wanted),
  }


def _mean(rows: Sequence[Fields]) -> list[Prediction]:
  mean = float(np.mean([float(row["label"]) for row in rows]))
  return [{"value": mean}] * len(rows)


TASKS.add(
  "regression",
  Task(
    {"classification": "label"},
    _numbers,
    _mean,
    "mean of the labels",
    summary="a number for a text: Pearson's correlation, mean squared error",
    numbers=True,
    problem=_form("value", _is_number, "a number"),
  ),
)


def _label_sets(rows: Sequence[Fields], found: Sequence[Prediction]) -> Measures:
  wanted = [frozenset(map(str, row["labels"])) for row in rows]
  predicted = [frozenset(map(str, p["labels"])) if "labels" in p else None for p in found]
  return {
    "micro_f1": classes.micro_f1([p or () for p in predicted], wanted),
    "exact_match": classes.accuracy(predicted, wanted),
  }


def _usual_set(rows: Sequence[Fields]) -> list[Prediction]:
  counts = collections.Counter(tuple(sorted(map(str, row["labels"]))) for row in rows)
  return [{"labels": list(counts.most_common(1)[0][0])}] * len(rows)


TASKS.add(
  "multi_label",
  Task(
    {"multi_label": "labels"},
    _label_sets,
    _usual_set,
    "most frequent set",
    summary="any number of classes of a text: micro-F1, exact match",
    problem=_form(
      "labels", lambda x: isinstance(x, list) and all(map(_is_name, x)), "a list of classes"
    ),
  ),
)


def _texts(rows: Sequence[Fields], found: Sequence[Prediction]) -> tuple[list[str], list[str]]:
  return [str(p.get("text", "")).strip() for p in found], [row["target"].strip() for row in rows]


def _exact(found: Sequence[Prediction], predicted: Sequence[str], wanted: Sequence[str]) -> Measure:
  """The share of equal texts. A row without a prediction is none, also if its answer is empty."""
  given = [text if p else None for p, text in zip(found, predicted, strict=True)]
  return classes.accuracy(given, wanted)


_SENTENCE = re.compile(r".+?(?:[.!?](?=\s)|\n|$)", re.DOTALL)


def lead(text: str) -> str:
  """The first sentence or line of a text."""
  found = _SENTENCE.match(text.strip())
  return found[0].strip() if found else ""


TASKS.add(
  "summarization",
  Task(
    {"seq2seq": "target"},
    lambda rows, found: {
      kind: overlap.rouge(*_texts(rows, found), (kind,))[kind]
      for kind in ("rougeL", "rouge1", "rouge2", "rougeLsum")
    },
    lambda rows: [{"text": lead(row["input"])} for row in rows],
    "lead sentence",
    summary="ROUGE-1, 2, L and Lsum",
    problem=_of_text,
  ),
)


def _translation(rows: Sequence[Fields], found: Sequence[Prediction]) -> Measures:
  predicted, wanted = _texts(rows, found)
  return {
    "bleu": overlap.bleu(predicted, wanted),
    "chrf": overlap.chrf(predicted, wanted),
    "exact_match": _exact(found, predicted, wanted),
  }


TASKS.add(
  "translation",
  Task(
    {"seq2seq": "target"},
    _translation,
    lambda rows: [{"text": row["input"]} for row in rows],
    "copy of the input",
    summary="BLEU, chrF, exact match",
    problem=_of_text,
  ),
)


_NO_ANSWER = "\0"  # stands for a missing prediction, and equals no answer


def _answers(rows: Sequence[Fields], found: Sequence[Prediction]) -> Measures:
  predicted = [str(p.get("answer", p.get("text", _NO_ANSWER))) for p in found]
  wanted = [
    [a["text"] for a in row["answers"]] if "answers" in row else [row["target"]] for row in rows
  ]
  return {
    "f1": answers.mean_f1(predicted, wanted),
    "exact_match": answers.exact_match(predicted, wanted),
  }


TASKS.add(
  "question_answering",
  Task(
    {"question_answering": "answers", "seq2seq": "target"},
    _answers,
    lambda rows: [{"answer": lead(row.get("context", row.get("input", "")))} for row in rows],
    "lead sentence",
    summary="F1 and exact match of SQuAD, of extracted and of generated answers",
    problem=lambda row, p: (
      _of_text(row, p)
      if "text" in p and "answer" not in p
      else _form("answer", lambda x: isinstance(x, str), "a text")(row, p)
    ),
  ),
)


def _tags(rows: Sequence[Fields], found: Sequence[Prediction]) -> Measures:
  wanted = [[str(tag) for tag in row["tags"]] for row in rows]
  predicted = [
    [str(tag) for tag in p.get("tags", ["O"] * len(tags))]
    for p, tags in zip(found, wanted, strict=True)
  ]
  same = [
    sum(x == w for x, w in zip(xs, ws, strict=True)) if p else 0
    for p, xs, ws in zip(found, predicted, wanted, strict=True)
  ]
  lengths_N, same_N = np.array([len(tags) for tags in wanted]), np.array(same)
  return {
    "f1": entities.f1(predicted, wanted),
    "accuracy": lambda weights_N: float(weights_N @ same_N / max(weights_N @ lengths_N, 1)),
  }


def _tags_problem(row: Fields, prediction: Prediction) -> str:
  is_list = lambda x: isinstance(x, list) and all(map(_is_name, x))
  if why := _form("tags", is_list, "a list of tags")(row, prediction):
    return why
  tags, words = len(prediction["tags"]), len(row["tags"])
  return "" if tags == words else f"there are {tags} tags for {words} words"


def _capitals(rows: Sequence[Fields]) -> list[Prediction]:
  """Runs of capitalized words, except the first word of a sentence, as the commonest entity."""
  found = collections.Counter(
    e.type for row in rows for e in entities.entities([str(tag) for tag in row["tags"]])
  )
  type_ = found.most_common(1)[0][0] if found else "X"
  out: list[Prediction] = []
  for row in rows:
    is_name = [word[:1].isupper() and i > 0 for i, word in enumerate(row["words"])]
    out.append(
      {
        "tags": [
          "O" if not name else f"{'I' if i and is_name[i - 1] else 'B'}-{type_}"
          for i, name in enumerate(is_name)
        ]
      }
    )
  return out


TASKS.add(
  "tagging",
  Task(
    {"tagging": "tags"},
    _tags,
    _capitals,
    "capitalized words as the commonest entity",
    summary="entity F1 as of conlleval, accuracy of words",
    problem=_tags_problem,
  ),
)


def _retrieval(rows: Sequence[Fields], found: Sequence[Prediction]) -> Measures:
  width = max([len(p.get("embedding", ())) for p in found], default=0) or 1
  nothing = [0.0] * width
  # Passages that several queries share are one.
  place = {text: i for i, text in enumerate(dict.fromkeys(row["positive"] for row in rows))}
  passages = [nothing] * len(place)
  for row, p in zip(rows, found, strict=True):
    if "positive_embedding" in p:
      passages[place[row["positive"]]] = p["positive_embedding"]
  queries = [p.get("embedding", nothing) for p in found]
  if len({len(vector) for vector in (*queries, *passages)}) > 1:
    raise UserError("the embeddings have different lengths; predict all of them with one model")
  ranks_N = ranking.ranks(queries, passages, [place[row["positive"]] for row in rows])
  ranks_N = np.where([bool(p) for p in found], ranks_N, np.inf)
  return {
    "recall@1": ranking.recall_at(1, ranks_N),
    "recall@5": ranking.recall_at(5, ranks_N),
    "recall@10": ranking.recall_at(10, ranks_N),
    "mrr": ranking.mean_reciprocal_rank(ranks_N),
  }


def _retrieval_problem(row: Fields, prediction: Prediction) -> str:
  of = lambda column: _form(column, _is_vector, "a list of numbers")(row, prediction)
  passage = "positive_embedding"
  return of("embedding") or (of(passage) if passage in prediction else "")


def _bags_of_words(rows: Sequence[Fields]) -> list[Prediction]:
  """TF-IDF vectors of the words: the passage that shares the rarest words comes first."""
  split = lambda text: re.findall(r"\w+", text.lower())
  texts = [split(row[name]) for row in rows for name in ("query", "positive")]
  documents = collections.Counter(word for text in texts[1::2] for word in set(text))
  place = {word: i for i, word in enumerate(documents)}
  vectors = np.zeros((len(texts), len(place)))
  for i, text in enumerate(texts):
    for word in text:
      if word in place:
        vectors[i, place[word]] += np.log((1 + len(rows)) / documents[word])
  pairs = zip(vectors[::2].tolist(), vectors[1::2].tolist(), strict=True)
  return [{"embedding": q, "positive_embedding": p} for q, p in pairs]


TASKS.add(
  "retrieval",
  Task(
    {"retrieval": "positive"},
    _retrieval,
    _bags_of_words,
    "shared words (TF-IDF)",
    summary="recall@1, @5, @10 and mean reciprocal rank of each query's passage among all",
    problem=_retrieval_problem,
  ),
)


def _replies(rows: Sequence[Fields], found: Sequence[Prediction]) -> Measures:
  predicted = [str(p.get("text", "")).strip() for p in found]
  wanted = [str(row["messages"][-1].get("content", "")).strip() for row in rows]
  return {
    "rougeL": overlap.rouge(predicted, wanted, ("rougeL",))["rougeL"],
    "exact_match": _exact(found, predicted, wanted),
  }


TASKS.add(
  "chat",
  Task(
    {"chat": "messages"},
    _replies,
    lambda rows: [{"text": str(row["messages"][-2].get("content", ""))} for row in rows],
    "copy of the last message",
    summary="ROUGE-L and exact match of the last answer of a conversation",
    problem=_of_text,
  ),
)
