"""Texts that a causal language model writes after a prompt."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.inference import load
from jaxgpt.inference.engine.engine import Engine
from jaxgpt.inference.engine.requests import Piece, Request, problem
from jaxgpt.inference.prompts import Prompts
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.tasks.predict.protocol import Prediction, Settings
from jaxgpt.tasks.predict.rows import Row
from jaxgpt.tree import PyTree


class Texts:
  """Texts that a causal language model writes after a prompt."""

  classes: Sequence[str] = ()

  def __init__(self, run: load.Run, kind: str, settings: Settings):
    self.kind, self._run, self._settings = kind, run, settings
    self._prompts = Prompts(run)
    rows = settings.rows * mesh_lib.num_batch_shards(run.mesh.shape)
    self._engine = Engine(run._replace(params=None), max_rows=rows)
    self.use(settings)

  def use(self, settings: Settings) -> None:
    """See `Predictor`."""
    self._settings = settings
    settings.sampling.check()
    # A faulty form is the fault of no row, nor are beams for which there is no room.
    self._engine.check(self._request((self._run.tokenizer.bos_id,), settings.seed))

  def prompt_ids(self, fields: Any) -> list[int]:
    """The ids of a row's prompt, as the run's documents begin.

    Raises:
      UserError: The chat template refuses the messages.
    """
    tokenizer = self._run.tokenizer
    if self.kind == "seq2seq":
      return [tokenizer.bos_id, *tokenizer.encode(fields["input"] + "\n")]
    if self.kind == "chat":
      return self._prompts.row(fields)
    return self._prompts.text(fields["text"])

  def request(self, row: Row, seed: int) -> Request:
    """What the engine is asked for a row.

    Raises:
      UserError: The prompt does not fit the model.
    """
    found = self._request(tuple(self.prompt_ids(row.fields)), seed)
    self._engine.check(found)
    return found

  def __call__(
    self, params: PyTree, rows: Sequence[Row], chunk: int = 0
  ) -> list[Prediction | UserError]:
    s, out = self._settings, list[Prediction | UserError]()
    requests = list[Request]()
    for row, seed in zip(rows, _seeds(s.seed, chunk, len(rows)), strict=True):
      try:
        request = self.request(row, seed)
      except UserError as e:
        out.append(e)
      else:
        out.append({})
        requests.append(request)

    def told(pieces: Iterable[Piece]) -> Iterator[Piece]:
      ended = 0
      for piece in pieces:
        if piece.finish is not None:
          ended += 1
          s.tell(ended / len(requests))
        yield piece

    self._engine.use(params)
    texts = iter(self._engine.texts(requests, told))
    if not s.keep_weights:
      self._engine.use(None)
    return [answer if isinstance(answer, UserError) else _answer(*next(texts)) for answer in out]

  def _request(self, ids: tuple[int, ...], seed: int) -> Request:
    s = self._settings
    return Request(ids, s.max_new, s.sampling, seed, constraint=s.constraint, beams=s.beams)


def _answer(text: str, finish: str) -> Prediction | UserError:
  why = problem(finish)
  return UserError(why) if why else {"text": text}


def _seeds(seed: int, chunk: int, count: int) -> list[int]:
  """A seed for each row of a chunk."""
  return np.random.SeedSequence([seed % 2**64, chunk]).generate_state(count, np.uint64).tolist()
