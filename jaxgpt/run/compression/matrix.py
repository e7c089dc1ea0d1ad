"""A stacked parameter as matrices.

M matrices (one per layer, or per layer and expert), I inputs, O outputs of a matrix.
"""

import math
from typing import Any, NamedTuple

import numpy as np


class Matrix(NamedTuple):
  """How a parameter is seen as matrices.

  Attributes:
    path: Path of the parameter.
    shape: Its shape.
    ins: Its input dimensions.
    outs: Its output dimensions. All others count matrices.
  """

  path: str
  shape: tuple[int, ...]
  ins: tuple[int, ...]
  outs: tuple[int, ...]

  @property
  def inputs(self) -> int:
    """I."""
    return math.prod(self.shape[i] for i in self.ins)

  @property
  def outputs(self) -> int:
    """O."""
    return math.prod(self.shape[i] for i in self.outs)

  @property
  def num_matrices(self) -> int:
    """M."""
    return math.prod(self.shape) // (self.inputs * self.outputs)

  def _order(self) -> tuple[int, ...]:
    chosen = {*self.ins, *self.outs}
    return (*(i for i in range(len(self.shape)) if i not in chosen), *self.ins, *self.outs)

  def view(self, weight: Any) -> Any:
    """The parameter, a NumPy or JAX array, as [M, I, O]."""
    return weight.transpose(self._order()).reshape(-1, self.inputs, self.outputs)

  def restored(self, matrices_MIO: Any) -> Any:
    """The parameter of a view: the inverse of `view`."""
    order = self._order()
    moved = matrices_MIO.reshape([self.shape[i] for i in order])
    return moved.transpose(tuple(int(i) for i in np.argsort(order)))
