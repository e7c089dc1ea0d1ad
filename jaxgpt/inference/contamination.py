"""Contamination of evaluation data: documents that share runs of words with the training data.

`jaxgpt data --decontaminate` removes such documents from the training data. Here the training data
is given, and the evaluation documents that it covers are found, with the same runs of words.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxgpt.data import pipeline, source
from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.text.filters import decontaminate, words
from jaxgpt.text.tokenizers.tokenizer import Tokenizer

_CHUNK = 1024  # documents that are read at a time


def shared(
  evaluated: Sequence[str], trained: Iterable[str], config: decontaminate.Config
) -> np.ndarray:
  """Finds the texts that share runs of words with others.

  Args:
    evaluated: The texts.
    trained: The others.
    config: Words per run, the fewest different runs of a text that count as contamination, and in
      how many texts at most a run may be, see `decontaminate.Config`.

  Returns:
    bool [evaluated].
  """
  of_text = [np.unique(words.ngram_hashes(text, config.words)) for text in evaluated]
  index, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *of_text]), return_counts=True)
  if config.common:
    index = index[counts <= config.common]
  found = np.zeros(len(index), bool)
  for text in trained if len(index) else ():
    runs = words.ngram_hashes(text, config.words)
    at = np.minimum(np.searchsorted(index, runs), len(index) - 1)
    found[at[index[at] == runs]] = True
  hit = index[found]
  return np.array([np.isin(runs, hit).sum() >= config.runs for runs in of_text], bool)


def texts(split: source.Split, tokenizer: Tokenizer, docs: np.ndarray) -> Iterator[str]:
  """The texts of documents, decoded."""
  for start in range(0, len(docs), _CHUNK):
    some = docs[start : start + _CHUNK]
    for ids in split.read_many(some, 0 * some, split.lengths[some] + 1):
      yield tokenizer.decode(ids)


def of_training(run: load.Run) -> Iterator[str]:
  """The texts that a run was trained on.

  Raises:
    UserError: The run has no prepared training data.
  """
  c = run.c
  if not run.data_digest or c.data.stream:
    why = f"data.stream={c.data.stream!r}" if c.data.stream else "it was imported"
    raise UserError(
      f"--contamination: the training data of this run is not known ({why}); leave it out"
    )
  for folder in pipeline.folders(c.data.path):
    split = source.open_split(folder, "train")
    yield from texts(split, run.tokenizer, np.arange(split.num_documents))
