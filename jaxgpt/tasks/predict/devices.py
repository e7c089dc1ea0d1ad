"""Functions of batches on the devices of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel import sharding
from jaxgpt.training import batches as batches_lib
from jaxgpt.training import xla_options
from jaxgpt.tree import PyTree


class Devices:
  """Runs functions of batches on a mesh. All processes of the mesh get the whole result."""

  def __init__(self, mesh: jax.sharding.Mesh):
    self.mesh = mesh
    self.shards = mesh_lib.num_batch_shards(mesh.shape)
    self._index, self._count = sharding.host_slice(mesh)

  def jit(self, f: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function whose results every process can read."""
    options = xla_options.of_mesh(self.mesh)
    return jax.jit(f, out_shardings=NamedSharding(self.mesh, P()), compiler_options=options)

  def put(self, batch: PyTree) -> PyTree:
    """A batch of the host on the devices, rows sharded over the mesh."""

    def own(x: np.ndarray) -> np.ndarray:
      size = len(x) // self._count
      return x[self._index * size : (self._index + 1) * size]

    return batches_lib.to_devices(jax.tree.map(own, batch), self.mesh)

  def get(self, result: PyTree) -> Any:
    """A result of a function of `jit`, on the host."""
    return jax.tree.map(np.asarray, result)
