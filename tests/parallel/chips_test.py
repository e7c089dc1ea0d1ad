"""The table of chips: lookups by device kind, and agreement of its figures with each other."""

import dataclasses
import math

import jax
import pytest

from jaxgpt.model.attention import masks, spec
from jaxgpt.model.attention.blocks.grid import Call
from jaxgpt.model.attention.kernels import splash
from jaxgpt.parallel import chips
from jaxgpt.training import xla_options


@pytest.mark.parametrize(
  "kind, name, peak",
  [
    ("TPU v4", "v4", 275e12),
    ("TPU v5 lite", "v5e", 197e12),
    ("TPU v5", "v5p", 459e12),
    ("TPU v5p", "v5p", 459e12),
    ("TPU v6 lite", "v6e", 918e12),
    ("TPU7x", "tpu7x", 1153.5e12),
    ("NVIDIA A100-SXM4-80GB", "a100", 312e12),
    ("NVIDIA H100 80GB HBM3", "h100", 989e12),
    ("NVIDIA H200", "h200", 989e12),
    ("NVIDIA H100 PCIe", "h100", 756e12),
    ("NVIDIA H100 NVL", "h100", 835e12),
    ("NVIDIA H200 NVL", "h200", 835e12),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100", None),
    ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "a100", None),
    ("NVIDIA B200", "b200", 2250e12),
  ],
)
def test_chip_and_peak_of_a_device_kind(kind, name, peak):
  assert chips.of_device(kind) is chips.CHIPS[name]
  assert chips.peak_flops(kind) == peak


@pytest.mark.parametrize("kind", ["cpu", "TPU v4 lite", "TPU v5 mega", "TPU7", "NVIDIA L4"])
def test_devices_that_are_not_in_the_table_have_no_peak_and_no_xla_options(kind):
  """A TPU that is not in the table may have less fast memory than one whose name it extends."""
  assert chips.of_device(kind) is None and chips.peak_flops(kind) is None
  assert xla_options.options(kind) == {}


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=chips.CHIPS)
def test_figures_of_a_chip_agree(chip):
  assert math.isclose(chip.clocked_flops, chip.peak_flops, rel_tol=0.01)
  assert chip.hbm_limit < chip.hbm
  assert bool(chip.libtpu) == bool(chip.torus) == (chip.gpu is None)
  if chip.gpu:
    assert chip.gpu.name.startswith(chip.device_kinds)


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e", "tpu7x"])
def test_tpus_give_matmuls_more_fast_memory_than_libtpu_does(name):
  assert int(chips.CHIPS[name].xla_options["xla_tpu_scoped_vmem_limit_kib"]) >= 65536


def test_attention_kernels_take_the_block_size_of_the_chip_they_are_compiled_for(monkeypatch):
  narrow = dataclasses.replace(
    chips.CHIPS["v5e"], name="narrow", device_kinds=("TPU v5 narrow",), attention_block=256
  )
  monkeypatch.setitem(chips.CHIPS._entries, "narrow", narrow)
  sizes = {}
  make = lambda mask, *, block_sizes, **_: sizes.setdefault(kind, block_sizes.block_q)
  monkeypatch.setattr(splash.splash_kernel, "make_splash_mha", make)
  for kind in ("TPU v5 narrow", "TPU v5"):
    device = jax.sharding.AbstractDevice(kind, num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
      band = masks.Band(causal=True)
      splash.make_kernel(Call(1, 1, 1, 1024, 1024, 64, band), spec.Spec(scale=1.0))
  assert sizes == {"TPU v5 narrow": 256, "TPU v5": 512}
  # CPUs, which interpret the kernel in tests.
  assert chips.of_tracing() is None and chips.attention_block(None) == 512
