"""Names of topologies, and the devices and rings that they stand for."""

import pytest

from jaxgpt.errors import UserError
from jaxgpt.plan import (
  topology,
)


@pytest.mark.parametrize(
  "name, chip, shape, slices, num_chips, num_devices",
  [
    ("v5e-256", "v5e", (16, 16), 1, 256, 256),
    ("v5p-128", "v5p", (4, 4, 4), 1, 64, 64),
    ("v6e-64x2", "v6e", (8, 8), 2, 128, 128),
    ("v4-64", "v4", (2, 4, 4), 1, 32, 32),
    ("tpu7x-128", "tpu7x", (4, 4, 4), 1, 64, 128),
    ("v5p:4x4x8", "v5p", (4, 4, 8), 1, 128, 128),
    ("v5p-12288", "v5p", (16, 16, 24), 1, 6144, 6144),
  ],
)
def test_names_of_topologies(name, chip, shape, slices, num_chips, num_devices):
  t = topology.parse(name)
  assert (t.chip.name, t.shape, t.slices, t.num_chips, t.num_devices) == (
    chip,
    shape,
    slices,
    num_chips,
    num_devices,
  )


@pytest.mark.parametrize(
  "name, wraps",
  [
    ("v5p-128", [True] * 3),
    ("v4-32", [False] * 3),
    ("v5e-256", [True, True, False]),
    ("v6e-128", [False, True, False]),
    ("v5e-64", [False] * 3),
  ],
)
def test_sides_whose_ends_are_linked(name, wraps):
  assert topology.parse(name).wraps == wraps


@pytest.mark.parametrize(
  "name, words",
  [
    ("pod", "write CHIP-SIZE"),
    ("v5e-24", "slices of 1, 4, 8"),
    ("v9-8", "topology=v9-8: chip='v9'.*choose one of v4, v5e"),
    ("v5p-7", "counted in cores, 2 per chip"),
    ("v5e:4x4x4", "2 dimensions"),
    ("v5e:0x4", "each side needs at least one chip"),
    ("h100-8", "h100 is a GPU"),
    ("v5e-0", "write"),
  ],
)
def test_a_topology_that_is_not_there_is_named(name, words):
  with pytest.raises(UserError, match=words):
    topology.parse(name)


@pytest.mark.parametrize(
  "name, chip, hosts, num",
  [
    ("h100x8", "h100", 1, 8),
    ("h100x8x2", "h100", 2, 16),
    ("a100x4", "a100", 1, 4),
    ("h200x8", "h200", 1, 8),
    ("b200x8x16", "b200", 16, 128),
  ],
)
def test_names_of_hosts_of_gpus(name, chip, hosts, num):
  t = topology.parse(name)
  assert (t.chip.name, t.slices, t.num_devices, t.num_chips) == (chip, hosts, num, num)


@pytest.mark.parametrize(
  "name, words",
  [
    ("h100x16", "1 to 8 GPUs"),
    ("h100x8x0", "1 to 8 GPUs"),
    ("h99x8", "chip='h99': choose one of v4, v5e"),
    ("h100", "for GPUs h100x8"),
    ("v4x8", "is not a GPU"),
  ],
)
def test_hosts_that_are_not_there_are_named(name, words):
  with pytest.raises(UserError, match=words):
    topology.parse(name)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
  def missing(*args, **kwargs):
    raise NotImplementedError("topology not implemented for cuda")

  monkeypatch.setattr(topology.gpu_target_config, "target_config", lambda gpu: "")
  monkeypatch.setattr(topology.topologies, "get_topology_desc", missing)
  with pytest.raises(UserError, match=r"pip install 'jaxgpt\[cuda\]'.*not implemented for cuda"):
    topology.devices(topology.parse("h100x8"))
