"""Decontamination: finds training documents that share n-grams with held-out or benchmark texts.

Words are compared in lower case and without punctuation, so that layout hides nothing. An n-gram is
called a *run* of words here, as in the options. (datatrove has a similar block, but it can only be
built from lighteval's task list.)

Phases, as in `dedup`. Each writes into an empty folder that the caller creates:

  collect   per task of held-out documents   -> the hashes of their runs
  merge     once                             -> an index by name ('validation', 'bench.jsonl')
  Filter    on training documents            -> the documents without runs from the index
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath
from numpy.typing import ArrayLike

from jaxgpt.errors import UserError
from jaxgpt.storage import strict_json
from jaxgpt.text.filters import step_specs, words
from jaxgpt.text.readers.documents import Document, Dropped

RULE = "contaminated"

_RUNS = "runs.npy"
_NAMES = "names.json"
_HELD = 1 << 22  # runs in memory before equal ones are merged


@dataclasses.dataclass(frozen=True)
class Config:
  """The definition of a contaminated document.

  Attributes:
    words: Words per run. Held-out texts with fewer words can't be found.
    runs: Fewest different runs of the index that a contaminated document contains.
    share: Smallest share of a document's own runs that are in the index.
    common: Runs in more held-out texts than this don't count, since they are common phrases
      (licences, forms, a benchmark's instructions). 0: all count.
    remove: Remove contaminated documents. False only reports them.
  """

  words: int = 13
  runs: int = 1
  share: float = 0.0
  common: int = 10
  remove: bool = True


def make(given: str = "") -> Config:
  """Parses options of `Config`, such as 'words=8,runs=2'.

  Raises:
    UserError: An unknown key or a bad value.
  """
  flag = "--decontaminate-options"
  defaults = {field.name: field.default for field in dataclasses.fields(Config)}
  _, options = step_specs.parse(f"runs:{given}", flag, {"runs": defaults})
  for key, least in (("words", 1), ("runs", 1), ("common", 0)):
    if options[key] < least:
      raise UserError(f"{flag}={given}: {key}={options[key]} must be at least {least}")
  if not 0 <= options["share"] <= 1:
    raise UserError(f"{flag}={given}: share={options['share']} must be in [0, 1]; 20 % is 0.2")
  return Config(**options)


def collect(documents: Iterable[Document], out: epath.PathLike, config: Config) -> dict[str, int]:
  """Writes the runs of held-out documents to `out`.

  Args:
    documents: The documents, of which only `text` is used.
    out: An empty folder.
    config: The definition of contamination.

  Returns:
    {'documents': all documents, 'too short': those with fewer words than a run}.
  """
  count = short = 0
  counts: list[np.ndarray] = []
  held = 0
  for document in documents:
    runs = _runs(document.text, config)
    count, short = count + 1, short + (not len(runs))
    counts.append(_counted(runs, np.ones(len(runs), np.uint32)))
    held += len(runs)
    if held > _HELD:
      counts = [_sum(counts)]
      held = 0
  np.save(pathlib.Path(out, _RUNS), _sum(counts))
  return {"documents": count, "too short": short}


def merge(
  inputs: Mapping[str, Sequence[epath.PathLike]], out: epath.PathLike, config: Config
) -> dict[str, int]:
  """Writes the index to `out`.

  Args:
    inputs: {name: folders of `collect`}. The names appear in reports.
    out: An empty folder.
    config: The definition of contamination.

  Returns:
    {name: runs in the index}.
  """
  sizes = {}
  for number, (name, folders) in enumerate(inputs.items()):
    total = _sum([np.load(pathlib.Path(folder, _RUNS)) for folder in folders])
    runs = total["run"][total["texts"] <= config.common] if config.common else total["run"]
    np.save(pathlib.Path(out, f"{number}.npy"), runs)
    sizes[name] = len(runs)
  pathlib.Path(out, _NAMES).write_text(strict_json.dumps(list(inputs)), encoding="utf-8")
  return sizes


class Filter:
  """Finds contaminated documents. It pickles as its folder and config.

  Attributes:
    found: {name: contaminated documents} that this object has seen. A document counts under each
      name whose runs it contains.
  """

  def __init__(self, folder: epath.PathLike, config: Config):
    """Args: folder: The folder of `merge`. config: The config that it was made with."""
    self._folder, self._config = folder, config
    names = json.loads(pathlib.Path(folder, _NAMES).read_text(encoding="utf-8"))
    self._index = {
      name: np.load(pathlib.Path(folder, f"{number}.npy"), mmap_mode="r")
      for number, name in enumerate(names)
    }
    self.found = dict.fromkeys(names, 0)

  def __reduce__(self) -> tuple[type["Filter"], tuple[epath.PathLike, Config]]:
    return Filter, (self._folder, self._config)

  def check(self, text: str) -> str | None:
    """The reason why a text is contaminated: 'NAME: 3 of 200 runs, such as "…"', or None."""
    runs, first = np.unique(words.ngram_hashes(text, self._config.words), return_index=True)
    reasons = []
    for name, index in self._index.items():
      at = np.searchsorted(index, runs)
      hits = (
        first[(at < len(index)) & (index[np.minimum(at, len(index) - 1)] == runs)]
        if len(index)
        else first[:0]
      )
      if len(hits) >= self._config.runs and len(hits) >= self._config.share * len(runs):
        self.found[name] += 1
        run = words.plain_words(text)[hits.min() : hits.min() + self._config.words]
        reasons.append(f"{name}: {len(hits)} of {len(runs)} runs, such as {' '.join(run)!r}")
    return "; ".join(reasons) or None

  def __call__(self, documents: Iterable[Document], dropped: Dropped) -> Iterator[Document]:
    """Yields the documents that stay, in order.

    Args:
      documents: The documents.
      dropped: The account that counts the others under `RULE`. If the config doesn't remove, all
        documents stay and only `found` counts.
    """
    for document in documents:
      why = self.check(document.text)
      if why and self._config.remove:
        dropped.add(RULE, document.source, why)
      else:
        yield document


def _runs(text: str, config: Config) -> np.ndarray:
  return np.unique(words.ngram_hashes(text, config.words))


def _counted(runs: ArrayLike, texts: ArrayLike) -> np.ndarray:
  """An array of runs and the number of texts that contain each."""
  out = np.empty(len(np.asarray(runs)), [("run", np.uint64), ("texts", np.uint32)])
  out["run"], out["texts"] = runs, texts
  return out


def _sum(counts: Sequence[np.ndarray]) -> np.ndarray:
  """Merges arrays of `_counted`: sorted runs, with the texts of all arrays added up."""
  every = np.concatenate([_counted((), ()), *counts])
  every = every[np.argsort(every["run"], kind="stable")]
  runs, starts = np.unique(every["run"], return_index=True)
  return _counted(runs, np.add.reduceat(every["texts"], starts) if len(starts) else ())
