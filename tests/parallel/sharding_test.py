"""Which rows of a batch a process reads, over fake processes, and how weights are sharded."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel import sharding


class Device:
  """A stand-in for a device of another process, with the attributes that JAX reads."""

  platform = device_kind = "cpu"

  def __init__(self, number, process):
    self.id, self.process_index = number, process


def mesh(processes, **sizes):
  """A mesh of these sizes over devices that belong to `processes`, in their order."""
  shape = [sizes.get(axis, 1) for axis in config.MESH_AXES]
  devices = np.array([Device(i, p) for i, p in enumerate(processes)], object).reshape(shape)
  return Mesh(devices, config.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


@pytest.mark.parametrize(
  "processes, sizes, want",
  [
    ([0, 0, 1, 1], dict(fsdp=4), [(0, 2), (1, 2)]),
    ([0, 0, 1, 1], dict(data=2, fsdp=2), [(0, 2), (1, 2)]),
    ([0, 1, 0, 1], dict(fsdp=4), [(0, 2), (1, 2)]),  # rows 0 and 2, rows 1 and 3
    ([0, 0, 1, 1], dict(fsdp=2, tensor=2), [(0, 2), (1, 2)]),
    ([0, 0, 1, 1], dict(tensor=4), [(0, 1), (0, 1)]),  # copies of all rows
    ([0, 0, 1, 1], dict(fsdp=2, expert=2), [(0, 2), (1, 2)]),  # experts share the batch out too
    ([0, 0, 1, 1, 2, 2, 3, 3], dict(data=2, tensor=4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
  ],
)
def test_processes_share_out_the_rows_that_their_devices_hold(processes, sizes, want):
  m = mesh(processes, **sizes)
  assert [sharding.host_slice(m, p) for p in range(len(want))] == want


@pytest.mark.parametrize("processes", [[0, 0, 0, 1], [0, 1, 1, 1]])
def test_unequal_parts_are_refused(processes):
  with pytest.raises(UserError, match="mesh.fsdp=4.*: the 2 processes would hold unequal parts"):
    sharding.host_slice(mesh(processes, fsdp=4), 0)


def test_one_process_holds_all():
  assert sharding.host_slice(mesh_lib.make(config.base().mesh)) == (0, 1)


def test_only_some_dimensions_may_be_left_whole_where_the_mesh_does_not_divide_them():
  on = mesh([0] * 4, fsdp=4)
  of = lambda axis, size: (
    sharding.params_shardings(
      {"w": (axis, "head_dim")},
      {"w": jax.ShapeDtypeStruct((size, 8), "float32")},
      on,
      sharding.DEFAULT,
    )["w"].spec
  )
  assert of("latent", 12) == of("embed", 12) == P("fsdp", None)
  assert of("latent", 10) == P(None, None)
  with pytest.raises(UserError, match="mesh.fsdp=4 does not divide dimension 'embed' = 10"):
    of("embed", 10)
