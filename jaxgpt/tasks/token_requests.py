"""Log likelihoods and generated tokens of many requests: batched by length, on all devices.

Every process makes the same calls with all requests and gets all results. Each batch is sharded
over the devices of all processes.

B row of a batch, T position.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxgpt.data import layouts
from jaxgpt.errors import UserError
from jaxgpt.inference import load, scoring
from jaxgpt.inference.engine.engine import Engine
from jaxgpt.inference.engine.requests import Request
from jaxgpt.model import transformer
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.training import batches as batches_lib

_SHORTEST = 32  # rows have this length, or twice that, …, or the model's context
_LOOK = 16  # new tokens between two looks for a reason to stop


class Requests:
  """Answers requests with a run's model.

  Attributes:
    run: The run.
    context: Its longest row, in tokens.
    params: The weights. They may be replaced, as training goes on.
    show: Called with the requests answered so far, and their number.
  """

  def __init__(self, run: load.Run, batch_size: int | None = None):
    """Prepares the model. Each length of rows is compiled when it is needed first.

    Args:
      run: From `load.load`.
      batch_size: Rows of a batch. None: the run's `eval.batch_size`. It is rounded up to a multiple
        of the devices that share a batch.
    """
    self.run, self.context = run, run.c.data.seq_len
    self.params = run.params
    self.show: Callable[[int, int], None] = lambda done, total: None
    shards = mesh_lib.num_batch_shards(run.mesh.shape)
    rows = batch_size or run.c.eval.batch_size
    self._rows = -(-rows // shards) * shards
    model = transformer.dropless(run.parts.model)
    self._score = scoring.make_step(model, run.mesh, run.c.objective.loss_chunk)
    self._engine: Engine | None = None

  def log_likelihoods(
    self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]
  ) -> list[tuple[float, bool]]:
    """Log likelihoods of continuations.

    Args:
      requests: (token ids of the context, token ids of the continuation), each with at least one.
        The beginning of a context that is too long is left out.

    Returns:
      For each request (log p(continuation | context), whether each of its tokens is the likeliest).

    Raises:
      UserError: A continuation is longer than the model's context.
    """
    rows, counts = [], []
    for context, continuation in requests:
      if len(continuation) > self.context:
        raise UserError(
          f"a continuation has {len(continuation)} tokens, the model's context {self.context} "
          "(data.seq_len): shorten it, or leave the task out"
        )
      rows.append([*context, *continuation][-(self.context + 1) :])
      counts.append(min(len(continuation), len(rows[-1]) - 1))
    out: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    answered = 0
    self.show(answered, len(rows))
    for numbers, scores in self._scored(rows):
      for i, number in enumerate(numbers):
        end = len(rows[number]) - 1
        here = slice(end - counts[number], end)
        out[number] = (
          -float(scores.nll[i, here].sum(dtype=np.float64)),
          bool(scores.correct[i, here].all()),
        )
      answered += len(numbers)
      self.show(answered, len(rows))
    return out

  def _scored(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], scoring.Scores]]:
    """(numbers of the rows, their scores) of each batch, the longest rows first."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    chunks = [order[i : i + self._rows] for i in range(0, len(order), self._rows)]

    def batches() -> Iterator[Any]:
      for chunk in chunks:
        length = self._length(len(rows[chunk[0]]) - 1)
        spans = [[np.array(rows[i], np.int32)] for i in chunk]
        yield self._on_devices(layouts.packed(spans, self._rows, length))

    with jax.set_mesh(self.run.mesh):
      yield from zip(chunks, scoring.run(self._score, self.params, batches()))

  def _length(self, needed: int) -> int:
    length = _SHORTEST
    while length < needed:
      length *= 2
    return min(length, self.context)

  def _on_devices(self, batch: Any) -> Any:
    """This process's rows of a batch, as its part of global arrays."""
    share = batches_lib.host_share(self.run.mesh)
    size = self._rows // share["host_count"]
    mine = slice(share["host_index"] * size, (share["host_index"] + 1) * size)
    return batches_lib.to_devices(jax.tree.map(lambda x: x[mine], batch), self.run.mesh)

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    max_new: int,
    settings: load.Sampling,
    is_done: Callable[[Sequence[int]], bool] = lambda new: False,
    seed: int = 0,
  ) -> list[list[int]]:
    """Continues prompts.

    Args:
      prompts: Token ids, at least one each. The beginning of a prompt that leaves no room for
        `max_new` tokens is left out.
      max_new: Most new tokens.
      settings: How tokens are drawn.
      is_done: Whether new tokens hold a reason to stop. It is asked from time to time.
      seed: Seed of the first prompt's draws. That of each further one is higher by 1.

    Returns:
      The new tokens of each prompt, without the token that ended them.

    Raises:
      UserError: The context has no room for `max_new` tokens.
    """
    room = self.context - max_new
    if room < 1:
      raise UserError(
        f"{max_new} new tokens leave no room for a prompt in the model's context of {self.context} "
        "tokens (data.seq_len): ask for fewer (max_gen_toks in the task's generation_kwargs)"
      )
    if self._engine is None:
      self._engine = Engine(self.run._replace(params=None), max_rows=self._rows)
    engine, found, answered = self._engine, dict[int, list[int]](), 0
    self.show(answered, len(prompts))
    engine.use(self.params)
    wanted = (
      Request(tuple(prompt[-room:]), max_new, settings, seed + i)
      for i, prompt in enumerate(prompts)
    )
    for piece in engine.run(wanted):
      new = found.setdefault(piece.request, [])
      looked = len(new) // _LOOK
      new += [token.id for token in piece.tokens]
      if piece.finish is not None:
        answered += 1
        self.show(answered, len(prompts))
      if piece.finish is None and len(new) // _LOOK > looked and is_done(new):
        engine.cancel(piece.request)
    engine.use(None)  # training needs the memory
    return [found[number] for number in sorted(found)]
