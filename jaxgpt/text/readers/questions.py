"""SQuAD's published files: an article per record, its paragraphs, and the questions on each.

    {"version": …, "data": [{"title": …, "paragraphs": [{"context": …, "qas": [
        {"id": …, "question": …, "answers": [{"text": …, "answer_start": …}]}]}]}]}

Files of one question per record, as tables hold them, need no unfolding.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxgpt.text.readers import records


def unfolded(items: Iterable[records.Item]) -> Iterator[records.Item]:
  """Yields a record per question of each article, and other items as they are.

  A question's record has the columns of the question, of its paragraph and of its article, such as
  `title`. It is called 'file:ARTICLE#QUESTION'.
  """
  for item in items:
    values = item.values if isinstance(item, records.Record) else None
    if isinstance(values, Mapping) and "paragraphs" in values and "question" not in values:
      yield from _questions(item, values)  # type: ignore[arg-type]  # a record, as its values say
    else:
      yield item


def _questions(article: records.Record, values: Mapping[str, Any]) -> Iterator[records.Item]:
  shared = {key: value for key, value in values.items() if key != "paragraphs"}
  number = 0
  for place, paragraph in enumerate(_listed(values["paragraphs"]), 1):
    where = f"{article.where}, paragraph {place}"
    if not isinstance(paragraph, Mapping) or not isinstance(paragraph.get("qas"), list):
      why = f"{paragraph!r:.60} is not {{context, qas: [{{question, answers}}]}}"
      yield records.Fault("wrong type", where, why)
      continue
    rest = {key: value for key, value in paragraph.items() if key != "qas"}
    for question in paragraph["qas"]:
      number += 1
      name = f"{article.where}#{number}"
      if isinstance(question, Mapping):
        yield records.Record(name, {**shared, **rest, **question})
      else:
        yield records.Fault("wrong type", name, f"{question!r:.60} is not {{question, answers}}")


def _listed(value: Any) -> list[Any]:
  return value if isinstance(value, list) else [value]
