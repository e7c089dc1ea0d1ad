"""Log likelihoods and generated tokens of many requests: batched by length, on all devices.

Every process makes the same calls with all requests and gets all results. Each batch is sharded
over the devices of all processes.

B row of a batch, T position.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.data import layouts
from jaxgpt.errors import UserError
from jaxgpt.inference import load, sampling, scoring
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.training import batches as batches_lib

_SHORTEST = 32  # rows have this length, or twice that, …, or the model's context
_SEGMENT = 32  # new tokens between two looks at the stop strings


class Requests:
  """Answers requests with a run's model.

  Attributes:
    run: The run.
    context: Its longest row, in tokens.
    params: The weights. They may be replaced, as training goes on.
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
    shards = mesh_lib.num_batch_shards(run.mesh.shape)
    rows = batch_size or run.c.eval.batch_size
    self._rows = -(-rows // shards) * shards
    self._score = scoring.make_step(run.parts.model, run.mesh, run.c.objective.loss_chunk)
    self._samplers: dict[int, sampling.Generate] = {}

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
    for numbers, scores in self._scored(rows):
      for i, number in enumerate(numbers):
        end = len(rows[number]) - 1
        here = slice(end - counts[number], end)
        out[number] = (
          -float(scores.nll[i, here].sum(dtype=np.float64)),
          bool(scores.correct[i, here].all()),
        )
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
      seed: Seed of the draws.

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
    cut = [list(prompt)[-room:] for prompt in prompts]
    order = sorted(range(len(cut)), key=lambda i: -len(cut[i]))
    out: list[list[int]] = [[] for _ in cut]
    with jax.set_mesh(self.run.mesh):
      for i in range(0, len(order), self._rows):
        chunk = order[i : i + self._rows]
        found = self._continue([cut[j] for j in chunk], max_new, settings, is_done, seed + i)
        for number, new in zip(chunk, found):
          out[number] = new
    return out

  def _continue(
    self,
    prompts: Sequence[list[int]],
    max_new: int,
    settings: load.Sampling,
    is_done: Callable[[Sequence[int]], bool],
    seed: int,
  ) -> list[list[int]]:
    """New tokens of one batch, drawn in segments, because stop strings are seen on the host."""
    slots = self._length(max(map(len, prompts)) + max_new)
    generate = self._sampler(slots)
    tokens_BS = np.zeros((self._rows, slots), np.int32)
    lengths_B = np.ones(self._rows, np.int32)
    for row, prompt in enumerate(prompts):
      tokens_BS[row, : len(prompt)] = prompt
      lengths_B[row] = len(prompt)
    starts, running = lengths_B.copy(), np.arange(self._rows) < len(prompts)
    for made in range(0, max_new, _SEGMENT):
      more = min(_SEGMENT, max_new - made)
      new_BS, ends_B = self._drawn(generate, tokens_BS, lengths_B, more, settings, seed, starts)
      ends_B = np.where(running, ends_B, lengths_B)
      for row in np.flatnonzero(running).tolist():
        tokens_BS[row, : ends_B[row]] = new_BS[row, : ends_B[row]]
        new = tokens_BS[row, starts[row] : ends_B[row]].tolist()
        running[row] = ends_B[row] - lengths_B[row] == more and not is_done(new)
      lengths_B = ends_B
      if not running.any():
        break
    return [tokens_BS[i, starts[i] : lengths_B[i]].tolist() for i in range(len(prompts))]

  def _drawn(
    self,
    generate: sampling.Generate,
    tokens_BS: np.ndarray,
    lengths_B: np.ndarray,
    more: int,
    settings: load.Sampling,
    seed: int,
    starts_B: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray]:
    batch = {"tokens": tokens_BS, "lengths": lengths_B, "starts": starts_B}
    on_devices = self._on_devices(batch)
    key = jax.random.key(seed)
    tokens, lengths = generate(
      self.params,
      on_devices["tokens"],
      on_devices["lengths"],
      more,
      key,
      settings,
      on_devices["starts"],
    )
    return np.array(tokens), np.array(lengths)

  def _sampler(self, slots: int) -> sampling.Generate:
    if slots not in self._samplers:
      run = self.run
      made = sampling.make(run.parts.model, slots, run.generation.end_ids, run.tokenizer.vocab_size)
      whole = NamedSharding(run.mesh, P())
      self._samplers[slots] = jax.jit(made, out_shardings=whole)
    return self._samplers[slots]
