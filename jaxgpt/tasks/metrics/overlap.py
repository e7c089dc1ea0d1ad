"""ROUGE, BLEU and chrF of texts, by the packages whose figures the field reports.

rouge-score (Lin 2004) for summaries, sacrebleu (arXiv:1804.08771) for translations. Both are in the
extra `tasks`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgpt.errors import optional
from jaxgpt.tasks.bootstrap import Measure, mean_of

ROUGE = ("rouge1", "rouge2", "rougeL")
_EXTRA = "tasks"


def rouge(
  predicted: Sequence[str], wanted: Sequence[str], kinds: Sequence[str] = ROUGE
) -> dict[str, Measure]:
  """{kind: mean F1}, as `python -m rouge_score.rouge --use_stemmer` computes each row.

  Args:
    predicted: Summaries.
    wanted: Their references.
    kinds: 'rouge1', 'rouge2', 'rougeL', or 'rougeLsum', for which each line is a sentence.

  Raises:
    UserError: rouge-score is not installed.
  """
  scorer = optional("rouge_score.rouge_scorer", _EXTRA, "ROUGE").RougeScorer(
    list(kinds), use_stemmer=True
  )
  rows = [scorer.score(w, p) for p, w in zip(predicted, wanted, strict=True)]
  return {kind: mean_of([row[kind].fmeasure for row in rows]) for kind in kinds}


def bleu(predicted: Sequence[str], wanted: Sequence[str]) -> Measure:
  """BLEU of a corpus, from 0 to 100, with sacrebleu's defaults (13a tokens, exp smoothing).

  Raises:
    UserError: sacrebleu is not installed.
  """
  return _corpus_score(_sacrebleu().BLEU(force=True), predicted, wanted)


def chrf(predicted: Sequence[str], wanted: Sequence[str]) -> Measure:
  """chrF2 of a corpus, from 0 to 100, with sacrebleu's defaults (6-grams of characters).

  Raises:
    UserError: sacrebleu is not installed.
  """
  return _corpus_score(_sacrebleu().CHRF(), predicted, wanted)


def _sacrebleu() -> Any:
  return optional("sacrebleu.metrics", _EXTRA, "BLEU and chrF")


def _corpus_score(metric: Any, predicted: Sequence[str], wanted: Sequence[str]) -> Measure:
  """A score of sacrebleu: a function of sums of each row's counts.

  sacrebleu's own bootstrap uses the same two methods. They have no public names, so the extra
  bounds its version and a test compares the values with its command line.
  """
  counts_NK = np.array(metric._extract_corpus_statistics(list(predicted), [list(wanted)]))

  def measure(weights_N: np.ndarray) -> float:
    sums_K = weights_N @ counts_NK
    return float(metric._aggregate_and_compute([[int(x) for x in sums_K]]).score)

  return measure
