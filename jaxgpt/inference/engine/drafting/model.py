"""Drafts of a smaller model with the same tokens.

It has a cache of its own, whose blocks lie as those of the engine's cache do: one table of blocks
serves both, and a beginning of a prompt that is found in one is found in the other.
"""

from collections.abc import Sequence

import jax
import numpy as np

from jaxgpt.inference import load
from jaxgpt.inference.engine import programs, weights
from jaxgpt.inference.engine.drafting.acceptance import Drafts
from jaxgpt.inference.engine.rows import Batch, Row, windows


class Model:
  """A drafter with a model. See `drafter.Drafter`."""

  def __init__(self, run: load.Run, vocab_size: int, context: int, size: programs.Size, most: int):
    """Prepares weights and cache.

    Args:
      run: The draft model.
      vocab_size: Ids from here on are never drafted.
      context: Longest context of the engine.
      size: Size of the cache, that of the engine's.
      most: K.
    """
    self.most, self._mesh = most, run.mesh
    model, prepared = weights.prepare(run.parts.model)
    self._programs = programs.Programs(model, vocab_size, size, run.mesh)
    platform = run.mesh.devices.flat[0].platform
    self._batch = Batch(size.rows, size.block_size, context, windows(model.cfg), 1, platform)
    with jax.set_mesh(run.mesh):
      self._weights = prepared(run.params)
      self._carried = self._programs.empty()

  def prefill(self, parts: Sequence[tuple[Row, int]], length: int) -> None:
    """See `drafter.Drafter`."""
    with jax.set_mesh(self._mesh):
      chunk = self._batch.chunk(parts, length)
      self._carried = self._programs.prefill(self._weights, self._carried, *chunk)

  def draft(
    self, rows: Sequence[tuple[int, Row]], room_B: np.ndarray, seen: tuple[jax.Array, jax.Array]
  ) -> Drafts | None:
    """See `drafter.Drafter`."""
    with jax.set_mesh(self._mesh):
      x = self._batch.step(rows, room_B, self.most)
      self._carried, drafts = self._programs.propose(self._weights, self._carried, x, seen)
    return drafts._replace(num=room_B)
