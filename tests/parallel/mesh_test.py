import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh


def section(**sizes):
  c = config.base().mesh
  c.update(sizes)
  return c


def test_minus_one_takes_what_is_left():
  assert mesh.axis_sizes(section(data=2, fsdp=-1), 8)["fsdp"] == 4
  assert dict(mesh.make(section(data=-1, fsdp=2)).shape) == {
    "data": 4,
    "fsdp": 2,
    "seq": 1,
    "tensor": 1,
    "expert": 1,
    "stage": 1,
  }
  assert mesh.make(section(), jax.devices()[:3]).shape["fsdp"] == 3


@pytest.mark.parametrize(
  "sizes, words",
  [
    (dict(data=3), "mesh.data=3.*3 does not divide the 8 devices"),
    (dict(data=3, fsdp=1), "mesh.data=3: the axes multiply to 3, but there are 8 devices"),
    (dict(data=-1), "only one axis may be -1"),
    (dict(data=0), "mesh.data=0.*at least 1"),
  ],
)
def test_a_mesh_that_does_not_fit_is_named(sizes, words):
  with pytest.raises(UserError, match=words):
    mesh.axis_sizes(section(**sizes), 8)


def test_a_batch_must_divide():
  sizes = mesh.axis_sizes(section(data=2, fsdp=4), 8)
  mesh.check_batch(sizes, 16, 2)
  with pytest.raises(
    UserError, match=r"data.batch_size=12 .*mesh.data=2 x mesh.fsdp=4 = 8; choose a multiple"
  ):
    mesh.check_batch(sizes, 12)
  with pytest.raises(UserError, match=r"optim.accumulate=4 = 32"):
    mesh.check_batch(sizes, 16, 4)


@pytest.mark.parametrize(
  "flags, version, want",
  [
    ("", "0.10.2", "--xla_cpu_experimental_ynn_fusion_type=-reduce"),
    ("--a=1", "0.11.0", "--a=1 --xla_cpu_experimental_ynn_fusion_type=-reduce"),
    ("--xla_cpu_experimental_ynn_fusion_type=dot", "0.10.2", None),
    ("--a=1", "0.10.1", None),
    ("", "0.12.0.1", None),
  ],
)
def test_wrong_sums_of_some_versions_are_off_unless_asked_for(flags, version, want):
  assert mesh.correct_xla_flags(flags, version) == (flags if want is None else want)


def test_sums_that_a_version_of_jaxlib_gets_wrong():
  """jax-ml/jax issues 39103 and 40412: one wrong, the other one the end of the process."""
  rows = jnp.stack([jnp.arange(32_769.0), jnp.zeros(32_769), jnp.zeros(32_769)], axis=1)
  squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
  np.testing.assert_array_equal(squares[-1], 32_768.0**2)
  x = jnp.ones((3, 1, 2, 2, 8, 8, 8))
  np.testing.assert_array_equal(jax.jit(lambda x: jnp.sum(x * x, axis=3))(x), 2)


class Chip:
  """What a mesh over slices asks of a device."""

  platform = device_kind = "cpu"

  def __init__(self, number):
    self.id, self.process_index, self.slice_index = number, number // 2, number // 4


class TorusChip:
  """What a mesh over a torus of 4 x 4 x 4 asks of a device."""

  platform, device_kind, core_on_chip, slice_index = "tpu", "TPU v5", 0, 0

  def __init__(self, number):
    self.id, self.process_index = number, number // 4
    self.coords = (number % 4, number // 4 % 4, number // 16)


@pytest.mark.parametrize("seq", [4, 8, 16])
def test_an_axis_may_be_part_of_the_torus(seq):
  made = mesh.make(section(seq=seq), [TorusChip(i) for i in range(64)])
  assert (made.shape["fsdp"], made.shape["seq"]) == (64 // seq, seq)
  assert len({d.id for d in made.devices.flat}) == 64


@pytest.mark.parametrize(
  "sizes, across",
  [
    (dict(data=2, fsdp=4), "data"),
    (dict(data=1, fsdp=8), "fsdp"),
    (dict(data=8, fsdp=1), "data"),
    (dict(data=1, fsdp=4, stage=2), "stage"),
    (dict(data=2, fsdp=2, stage=2), "data"),
  ],
)
def test_one_axis_goes_over_the_slices(sizes, across):
  made = mesh.make(section(**sizes), [Chip(i) for i in range(8)])
  assert {axis: made.shape[axis] for axis in sizes} == sizes
  first, second = np.split(made.devices, 2, axis=config.MESH_AXES.index(across))
  assert {d.slice_index for d in first.flat} == {0} and {d.slice_index for d in second.flat} == {1}


def test_slices_that_no_axis_divides_are_named():
  chips = [Chip(i) for i in range(12)]  # three slices
  sizes = mesh.axis_sizes(section(data=2, fsdp=2, tensor=1), 4)
  with pytest.raises(UserError, match="the 3 slices need a multiple of 3"):
    mesh.over_slices(sizes, chips)


def test_memory_that_a_device_lacks_is_named():
  here = mesh.make(section(), jax.devices()[:1])
  mesh.check_memory(here, "pinned_host", "model.remat='offload:q'")
  with pytest.raises(
    UserError, match="model.remat='offload:q' needs memory of the kind tape, and cpu has"
  ):
    mesh.check_memory(here, "tape", "model.remat='offload:q'")


@pytest.mark.parametrize(
  "devices, version, want", [(8, "0.10.2", 264), (1, "0.10.2", 33), (8, "0.12.0.1", None)]
)
def test_a_thread_for_each_program_in_flight(devices, version, want):
  assert mesh.threads_for_collectives(devices, version) == want


_PROGRAMS = """
from jaxgpt.parallel import mesh
mesh.prepare_cpu()
import jax, numpy as np
from jaxgpt.run import digests
devices = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
rows = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("fsdp"))
ones = [np.ones((8 * (i % 5 + 1), i % 7 + 1), np.float32) for i in range(100)]
arrays = {f"{i}": jax.device_put(x, rows) for i, x in enumerate(ones)}
for _ in range(5):
  digests.of(arrays)
print("done")
"""


@pytest.mark.slow
def test_a_hundred_programs_in_flight_on_eight_devices():
  """Digests of a checkpoint's arrays, which blocked each other forever in jaxlib 0.10.2."""
  ended = "--xla_cpu_collective_call_terminate_timeout_seconds=60"
  environment = {
    **{k: v for k, v in os.environ.items() if k != "PJRT_NPROC"},
    "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {ended}",
  }
  done = subprocess.run(
    [sys.executable, "-c", _PROGRAMS], env=environment, capture_output=True, text=True, check=False
  )
  assert done.stdout == "done\n", done.stderr[-2000:]
