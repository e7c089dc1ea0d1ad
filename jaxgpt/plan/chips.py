"""What a plan knows of each generation of chips: one table, with its sources.

A *device* is what JAX calls one: a chip, but half a chip of TPU7x. Figures are of one device.
Sources: Cloud TPU's pages of the generations (peak rates, HBM, interconnect), JAX's scaling book
(clock rates, bandwidths), libtpu for `hbm_limit`, which is what its compiler says is available (of
v5p it says 95.73 GiB, the pages 95).
GPUs: NVIDIA's data sheets (dense bf16 rates, NVLink), DGX and HGX for the network of a host.
"""

from typing import NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.plan import gpu_targets

GIB = 1 << 30


class Chip(NamedTuple):
  """One generation.

  Attributes:
    name: as in a topology, such as 'v5e'.
    libtpu: the name in libtpu's topologies; '' where another compiler makes the program.
    clock: cycles a second.
    flops_per_cycle: bf16, of the matrix units.
    hbm: bytes of memory.
    hbm_limit: bytes that a program may take.
    hbm_bandwidth: bytes a second.
    ici_bandwidth: bytes a second to the neighbours, all links and both directions; of a GPU, what it
      sends over NVLink.
    dcn_bandwidth: bytes a second to other slices or hosts.
    torus: dimensions of the interconnect.
    cores: of a chip, as the number in a name such as 'v5p-128' counts them.
    devices: of a chip.
    matmul_rate: share of the peak that the matmuls of compiled models reach, see `estimate`.
    overlaps_gathers: whether its compiler runs weights' gathers beside compute.
    options: libtpu's chip configuration.
    gpu: a `gpus.Gpu`, or None.
  """

  name: str
  libtpu: str
  clock: float
  flops_per_cycle: int
  hbm: int
  hbm_limit: int
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float
  torus: int
  cores: int = 1
  devices: int = 1
  matmul_rate: float = 0.95
  overlaps_gathers: bool = False
  options: tuple = ()
  gpu: gpu_targets.Gpu | None = None

  @property
  def peak_flops(self):
    """bf16 FLOP/s."""
    return self.clock * self.flops_per_cycle


# What `launch/` lets XLA take; the rest is for CUDA, NCCL and cuDNN.
_GPU_MEMORY_FRACTION = 0.92


def _gpu(name, gpu, clock, flops, nvlink, network):
  limit = int(gpu.memory * _GPU_MEMORY_FRACTION)
  return Chip(
    name,
    "",
    clock,
    gpu.cores * flops,
    gpu.memory,
    limit,
    gpu.bandwidth,
    nvlink,
    network,
    0,
    matmul_rate=0.85,
    overlaps_gathers=True,
    gpu=gpu,
  )


CHIPS = {
  chip.name: chip
  for chip in (
    # A host's network (100 to 400 Gbit/s) is shared by its 4 or 8 chips.
    Chip(
      "v4",
      "v4",
      1.05e9,
      262_144,
      32 * GIB,
      int(30.75 * GIB),
      1.228e12,
      300e9,
      3.1e9,
      3,
      cores=2,
      options=(("chip_config_name", "megacore"),),
    ),
    Chip(
      "v5e",
      "v5e",
      1.5e9,
      131_072,
      16 * GIB,
      int(15.75 * GIB),
      0.819e12,
      200e9,
      3.1e9,
      2,
      overlaps_gathers=True,
    ),
    Chip("v5p", "v5p", 1.75e9, 262_144, 96 * GIB, 95 * GIB, 2.765e12, 600e9, 6.2e9, 3, cores=2),
    Chip(
      "v6e",
      "v6e",
      1.75e9,
      524_288,
      32 * GIB,
      int(31.24 * GIB),
      1.640e12,
      448e9,
      6.2e9,
      2,
      matmul_rate=0.82,
    ),
    Chip(
      "tpu7x",
      "tpu7x",
      2.2e9,
      524_288,
      96 * GIB,
      int(94.74 * GIB),
      3.69e12,
      600e9,
      6.2e9,
      3,
      cores=2,
      devices=2,
    ),
    *(
      _gpu(*row)
      for row in (
        # Dense bf16 FLOPs of a multiprocessor's cycle at the clock of the data sheet's rate; NVLink
        # one way; a network card a GPU, of 200 Gbit/s in an A100's host and of 400 since.
        ("a100", gpu_targets.A100, 1.41e9, 2048, 300e9, 25e9),
        ("h100", gpu_targets.H100, 1.83e9, 4096, 450e9, 50e9),
        ("h200", gpu_targets.H200, 1.83e9, 4096, 450e9, 50e9),
        ("b200", gpu_targets.B200, 1.856e9, 8192, 900e9, 50e9),
      )
    ),
  )
}

# Chips of a slice -> their torus.
_SHAPES_2D = {
  1: (1, 1),
  4: (2, 2),
  8: (2, 4),
  16: (4, 4),
  32: (4, 8),
  64: (8, 8),
  128: (8, 16),
  256: (16, 16),
}
_SMALL_3D = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}


def torus_shape(chip, num_chips):
  """The usual torus of a number of chips, the most cubic of those that are multiples of 4.

  Args:
    chip: a `Chip`.
    num_chips: how many.

  Raises:
    UserError: slices of this size are not sold.
  """
  if chip.torus == 2:
    if num_chips in _SHAPES_2D:
      return _SHAPES_2D[num_chips]
    raise UserError(
      f"{chip.name} comes in slices of {', '.join(map(str, _SHAPES_2D))} chips, not {num_chips}"
    )
  if num_chips in _SMALL_3D:
    return _SMALL_3D[num_chips]
  shapes = [
    (a, b, num_chips // (a * b))
    for a in range(4, 33, 4)
    for b in range(a, 33, 4)
    if num_chips % (a * b) == 0 and num_chips // (a * b) % 4 == 0 and num_chips // (a * b) >= b
  ]
  if not shapes:
    raise UserError(
      f"{chip.name} comes in slices of 4, 8, 16, 32 and multiples of 64 chips, not "
      f"{num_chips}; give the shape itself, such as {chip.name}:4x4x8"
    )
  return min(shapes, key=lambda s: (max(s) / min(s), s))


def find(name):
  """The chip of a name.

  Raises:
    UserError: no such generation.
  """
  if name not in CHIPS:
    raise UserError(f"--topology: no chip {name!r}; there are: {', '.join(CHIPS)}")
  return CHIPS[name]
