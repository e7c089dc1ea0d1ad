"""Evaluation documents that share runs of words with training documents are found."""

from jaxgpt.inference import contamination
from jaxgpt.text.filters import decontaminate

LINE = "one two three four five six seven"


def found(evaluated, trained, **config):
  config = decontaminate.Config(**{"words": 4, **config})
  return contamination.shared(evaluated, trained, config).tolist()


def test_runs_of_words_are_compared_without_layout_and_case():
  trained = ["Zero ONE, two\nthree - four five."]
  evaluated = [LINE, "one two three x four", "four five six seven", "", "two three four five"]
  assert found(evaluated, trained) == [True, False, False, False, True]
  assert found(evaluated, trained, words=5) == [True, False, False, False, False]
  assert found(evaluated, trained, runs=2) == [True, False, False, False, False]
  assert found(evaluated, []) == [False] * 5 and found([], trained) == []


def test_runs_that_many_evaluated_texts_share_do_not_count():
  assert found([LINE] * 3, [LINE], common=3) == [True] * 3
  assert found([LINE] * 3, [LINE], common=2) == [False] * 3
