"""Contamination: training documents that hold runs of words of held-out or benchmark texts.

Words are compared in small letters and without signs, so layout and punctuation hide nothing.
(datatrove's block does the same, but can be built by lighteval's task list alone.)

Stages, as in `dedup`: each writes into an empty folder that the caller makes.

  collect   once a task of held-out documents   -> their runs of words
  merge     once                                -> an index by name ('validation', 'bench.jsonl')
  Filter    wherever training documents pass    -> those without what is in the index
"""

import dataclasses
import json
import pathlib

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.text.filters import step_specs, words

RULE = "contaminated"

_RUNS = "runs.npy"
_NAMES = "names.json"
_HELD = 1 << 22  # runs that are held before equal ones are counted up


@dataclasses.dataclass(frozen=True)
class Config:
  """What makes a document contaminated.

  Attributes:
    words: in a run; held-out texts with fewer can't be found.
    runs: so many different runs must be found in it,
    share: and so large a share of its own runs.
    common: runs in more held-out texts than that are phrases that everybody uses (licences, forms,
      a benchmark's instructions) and don't count; 0: all count.
    remove: False only reports.
  """

  words: int = 13
  runs: int = 1
  share: float = 0.0
  common: int = 10
  remove: bool = True


def make(given=""):
  """Reads options such as 'words=8,runs=2'; they are those of `Config`.

  Raises:
    UserError: an unknown key or a bad value.
  """
  flag = "--decontaminate-options"
  defaults = {field.name: field.default for field in dataclasses.fields(Config)}
  _, options = step_specs.parse(f"runs:{given}", flag, {"runs": defaults})
  for key, least in (("words", 1), ("runs", 1), ("share", 0), ("common", 0)):
    if options[key] < least:
      raise UserError(f"{flag}={given}: {key}={options[key]} must be at least {least}")
  return Config(**options)


def collect(documents, out, config):
  """The runs of words of held-out documents, in `out`.

  Args:
    documents: an iterable of `read.Document`, or of anything with a `text`.
    out: an empty folder.
    config: a `Config`.

  Returns:
    {'documents': all, 'too short': those with fewer words than a run has}.
  """
  count = short = 0
  parts, held = [], 0
  for document in documents:
    runs = _runs(document.text, config)
    count, short = count + 1, short + (not len(runs))
    parts.append(_counted(runs, np.ones(len(runs), np.uint32)))
    held += len(runs)
    if held > _HELD:
      parts = [_sum(parts)]
      held = 0
  np.save(pathlib.Path(out, _RUNS), _sum(parts))
  return {"documents": count, "too short": short}


def merge(inputs, out, config):
  """The index, in `out`.

  Args:
    inputs: {name: folders of `collect`}; the names appear in reports.
    out: an empty folder.
    config: a `Config`.

  Returns:
    {name: runs of words in the index}.
  """
  sizes = {}
  for number, (name, folders) in enumerate(inputs.items()):
    total = _sum([np.load(pathlib.Path(folder, _RUNS)) for folder in folders])
    runs = total["run"][total["texts"] <= config.common] if config.common else total["run"]
    np.save(pathlib.Path(out, f"{number}.npy"), runs)
    sizes[name] = len(runs)
  pathlib.Path(out, _NAMES).write_text(json.dumps(list(inputs)), encoding="utf-8")
  return sizes


class Filter:
  """Finds contaminated documents. It pickles as its folder and config.

  Attributes:
    found: {name: contaminated documents} so far, by this object; a document counts under each name.
  """

  def __init__(self, folder, config):
    """Takes the folder of `merge` and the config it was made with."""
    self._folder, self._config = folder, config
    names = json.loads(pathlib.Path(folder, _NAMES).read_text(encoding="utf-8"))
    self._index = {
      name: np.load(pathlib.Path(folder, f"{number}.npy"), mmap_mode="r")
      for number, name in enumerate(names)
    }
    self.found = dict.fromkeys(names, 0)

  def __reduce__(self):
    return Filter, (self._folder, self._config)

  def check(self, text):
    """Why a text is contaminated: 'NAME: 3 of 200 runs, such as "…"', or None."""
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

  def __call__(self, documents, dropped):
    """The documents that stay, in order.

    Args:
      documents: an iterable of `read.Document`.
      dropped: a `read.Dropped`, which counts the others under `RULE`. Where the config doesn't
        remove, all stay and nothing is counted there, but in `found`.
    """
    for document in documents:
      why = self.check(document.text)
      if why and self._config.remove:
        dropped.add(RULE, document.source, why)
      else:
        yield document


def _runs(text, config):
  return np.unique(words.ngram_hashes(text, config.words))


def _counted(runs, texts):
  out = np.empty(len(runs), [("run", np.uint64), ("texts", np.uint32)])
  out["run"], out["texts"] = runs, texts
  return out


def _sum(parts):
  """Runs of all parts, sorted, with the number of texts they are in."""
  every = np.concatenate([_counted((), ()), *parts])
  every = every[np.argsort(every["run"], kind="stable")]
  runs, starts = np.unique(every["run"], return_index=True)
  return _counted(runs, np.add.reduceat(every["texts"], starts) if len(starts) else ())
