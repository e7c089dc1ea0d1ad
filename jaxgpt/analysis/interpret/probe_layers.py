"""Probes of every layer of a run, on tagged words of a prepared folder.

The activation of a word is that of its first token. A control task gives each token id a random
class (see `probes`).

B batch, T position, D model, L layers, R residual streams (L + 1), M words.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgpt.analysis.interpret import explain, lens, probes, taps
from jaxgpt.data import source
from jaxgpt.errors import UserError
from jaxgpt.run import init_from
from jaxgpt.text.tokenizers import base

_ROWS = 16  # documents of a batch


class Words(NamedTuple):
  """Tagged words and what a model makes of them.

  Attributes:
    streams: [R, M, D], the residual stream before the first layer and after each.
    labels: [M], class numbers.
    types: [M], token ids.
    documents: Number of documents that they are from.
    cut: Number of words beyond the model's context, which are left out.
  """

  streams: np.ndarray
  labels: np.ndarray
  types: np.ndarray
  documents: int
  cut: int


def check(split: source.Split, tokenizer: base.Tokenizer, own: base.Tokenizer) -> None:
  """Checks that data has tagged words in the tokens of a run.

  Args:
    split: The split.
    tokenizer: Its tokenizer.
    own: That of the run.

  Raises:
    UserError: It has not.
  """
  if split.kind != "tagging":
    raise UserError(
      f"--data is of kind {split.kind!r}, and probes need words with tags; prepare them with "
      "jaxgpt data --kind=tagging --tokenizer=RUN/tokenizer"
    )
  if not init_from.same_tokens(tokenizer, own):
    raise UserError(
      "--data is in the tokens of another tokenizer than the run; prepare it with "
      "jaxgpt data --kind=tagging --tokenizer=RUN/tokenizer"
    )


def read(
  m: explain.Model, split: source.Split, most: int, classes: Sequence[int] | None = None
) -> Words:
  """Reads documents in order until there are enough words.

  Args:
    m: From `explain.of_run`.
    split: Data of kind tagging.
    most: Number of words; the last document is read to its end.
    classes: Words of these classes are kept, of those that were read. None: all.
  """
  counts = np.array([len(split.tags(doc)) for doc in range(split.num_documents)])
  docs = np.arange(min(int(np.searchsorted(np.cumsum(counts), most)) + 1, split.num_documents))
  longest = int(split.lengths[docs].max()) + 1
  T = min(-(-longest // 32) * 32, m.c.model.max_len)
  streams, labels, types, cut = [], [], [], 0
  for begin in range(0, len(docs), _ROWS):
    here = docs[begin : begin + _ROWS]
    sizes = np.minimum(split.lengths[here] + 1, T)
    tokens_BT, real_BT = np.zeros((_ROWS, T), np.int32), np.zeros((_ROWS, T), np.int32)
    for i, ids in enumerate(split.read_many(here, np.zeros_like(here), sizes)):
      tokens_BT[i, : len(ids)], real_BT[i, : len(ids)] = ids, 1
    found = taps.read(
      m.model,
      m.params,
      taps.Inputs(jnp.asarray(tokens_BT), jnp.asarray(real_BT)),
      ("resid_pre", "resid_final"),
    )
    streams_RBTD = np.asarray(lens.streams(found.at), np.float32)
    for i, doc in enumerate(here):
      tags = split.tags(doc)
      kept = tags[tags[:, 0] < T]
      cut += len(tags) - len(kept)
      if classes is not None:
        kept = kept[np.isin(kept[:, 1], classes)]
      streams.append(streams_RBTD[:, i, kept[:, 0]])
      labels.append(kept[:, 1])
      types.append(tokens_BT[i, kept[:, 0]])
  joined = np.concatenate(streams, 1)
  return Words(joined, np.concatenate(labels), np.concatenate(types), len(docs), cut)


def classes_of(split: source.Split, tags: str | None) -> list[int] | None:
  """The numbers of the classes that are named in a list with commas. None: all.

  Raises:
    UserError: There is no such class.
  """
  if tags is None:
    return None
  names = tags.split(",")
  if not set(names) <= set(split.label_names):
    raise UserError(f"--tags={tags}: there are {', '.join(split.label_names)}; choose among them")
  return [split.label_names.index(name) for name in names]


def probe(words: Words, seed: int = 0) -> list[probes.Probe]:
  """A probe with its control task for each residual stream.

  Args:
    words: From `read`.
    seed: Seed of the split and of the control labels.
  """
  return [probes.probe(x_MD, words.labels, words.types, seed=seed) for x_MD in words.streams]
