"""Accelerator generations: one entry per chip, read by training and planning alike.

Training looks a chip up by the name that JAX gives its devices and takes the peak rate for MFU, the
XLA options of the train step and the block size of attention kernels. `jaxgpt plan` looks it up by
the name in `--topology` and takes everything else. To add a chip, add one entry below.

A *device* is one entry of `jax.devices()`: a chip, except on TPU7x, whose chips show up as two
devices each. All figures below are per device unless they say otherwise.

Sources: Cloud TPU documentation (peak rates, HBM, interconnect), the JAX scaling book (clock rates,
bandwidths, also of PCIe), libtpu (`hbm_limit`: the memory that its compiler reports as available;
for v5p it reports 95.73 GiB where the documentation says 95), NVIDIA data sheets (dense bf16 rates,
memory, NVLink, clocks), the CUDA programming guide (compute capabilities), DGX and HGX
specifications (network of a host).
"""

import dataclasses
from collections.abc import Mapping

import jax

from jaxgpt.config.registry import Registry

GIB = 1 << 30
LANES = 128  # width of a TPU's vector registers; the last dimension of an array is padded to it
_DEFAULT_ATTENTION_BLOCK = 512
_MIG = " MIG "  # in the device kind of a slice, as in 'NVIDIA H100 80GB HBM3 MIG 1g.10gb'


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTarget:
  """GPU parameters that XLA needs to compile for a GPU that is not present.

  Attributes:
    name: Device name as the driver reports it.
    capability: Compute capability, (major, minor).
    cores: Streaming multiprocessors.
    fpus: float32 units per multiprocessor.
    clock: Highest clock rate in Hz.
    memory: Bytes of memory as the driver reports them.
    bandwidth: Memory bandwidth in bytes/s.
    cache: Bytes of L2 cache.
    shared: Bytes of shared memory per multiprocessor.
    links: Number of NVLinks.
  """

  name: str
  capability: tuple[int, int]
  cores: int
  fpus: int
  clock: float
  memory: int
  bandwidth: float
  cache: int
  shared: int
  links: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One accelerator generation.

  Attributes:
    name: Name in a topology, such as 'v5e' in `--topology=v5e-256`.
    device_kinds: Names that JAX gives such a device (`device_kind`). A GPU's is a prefix: its
      memory and form factor follow, as in 'NVIDIA H100 80GB HBM3'. A TPU's is the whole name, since
      'TPU v4 lite' is another chip than 'TPU v4'.
    peak_flops: bf16 FLOP/s on the vendor's data sheet. The MFU of a run is relative to it.
    variant_flops: The same of variants, by the beginning of their device kind. Plans are for the
      chip itself.
    clock: Cycles per second, to convert the compiler's cycle counts into seconds.
    flops_per_cycle: bf16 FLOPs of the matrix units per cycle.
    hbm: Bytes of memory.
    hbm_limit: Bytes that a program and its state may take.
    hbm_bandwidth: Memory bandwidth in bytes/s.
    ici_bandwidth: TPU: bytes/s to the neighbours, summed over links and both directions. GPU:
      bytes/s sent over NVLink.
    dcn_bandwidth: Bytes/s to other slices or hosts, over the data center network.
    host_bandwidth: Bytes/s to the host's memory, one direction, or 0 if it is not known.
    torus: Dimensions of the interconnect, 2 or 3, or 0 for GPUs.
    cores: Cores per chip, as counted in topology names such as 'v5p-128'.
    devices: Devices per chip.
    matmul_rate: Fraction of the peak that matmuls reach while they do not wait for memory, for
      `plan.time_estimate`.
    overlaps_gathers: Whether the compiler overlaps weight all-gathers with compute.
    xla_options: XLA options of the train step. `mesh.compiler_options` override them.
    attention_block: Tokens per block of queries and of keys in the attention kernel, where
      `model.attention.blocks` has no measured blocks.
    libtpu: Name in libtpu's topologies, or '' if another compiler builds the program.
    libtpu_options: Further arguments of libtpu's topology description.
    gpu: Target description for XLA's GPU compiler, or None for a TPU.
  """

  name: str
  device_kinds: tuple[str, ...]
  peak_flops: float
  clock: float
  flops_per_cycle: int
  hbm: int
  hbm_limit: int
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float
  host_bandwidth: float = 0.0
  torus: int = 0
  cores: int = 1
  devices: int = 1
  matmul_rate: float = 1.0
  overlaps_gathers: bool = False
  xla_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
  attention_block: int = _DEFAULT_ATTENTION_BLOCK
  variant_flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
  libtpu: str = ""
  libtpu_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
  gpu: GpuTarget | None = None

  @property
  def clocked_flops(self) -> float:
    """bf16 FLOP/s at `clock`, within 1% of `peak_flops`. Plans count cycles and use this one."""
    return self.clock * self.flops_per_cycle


CHIPS: Registry[Chip] = Registry("chip")


def of_device(device_kind: str) -> Chip | None:
  """The chip of a device, or None for devices without an entry, such as CPUs.

  Args:
    device_kind: From `jax.Device.device_kind`, such as 'TPU v5 lite' or 'NVIDIA H100 80GB HBM3'.
      The longest match wins. See `Chip.device_kinds`.
  """
  matches = [
    (len(name), chip)
    for chip in CHIPS.values()
    for name in chip.device_kinds
    if device_kind == name or (chip.gpu and device_kind.startswith(name))
  ]
  return max(matches, key=lambda match: match[0])[1] if matches else None


def peak_flops(device_kind: str) -> float | None:
  """bf16 FLOP/s of one device on its data sheet, or None where it is not known.

  It is not known of CPUs, and of the slices of a GPU that NVIDIA's MIG makes.
  """
  chip = of_device(device_kind)
  if chip is None or (chip.gpu and _MIG in device_kind):
    return None
  variants = [name for name in chip.variant_flops if device_kind.startswith(name)]
  return chip.variant_flops[max(variants, key=len)] if variants else chip.peak_flops


def of_tracing() -> Chip | None:
  """The chip that JAX is tracing a function for, or None for devices without an entry.

  These are the devices of the mesh that `jax.set_mesh` has set, which may be devices that only
  compile, or without a mesh those of the default backend.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  return of_device(device.device_kind)


def attention_block(chip: Chip | None) -> int:
  """Block size of attention kernels in tokens, on chips without measured blocks."""
  return chip.attention_block if chip else _DEFAULT_ATTENTION_BLOCK


def register(chip: Chip) -> None:
  """Adds an entry to `CHIPS` under its name."""
  CHIPS.add(chip.name, chip)


# XLA options of the train step. The gain of each is in docs/log.md.
#
# A matmul next to an all-gather over mesh.tensor can be cut into a loop of narrow matmuls that
# overlap with the pieces of the gather. These take two to four times as long as the wide matmul
# and its gather together, so the threshold in MiB is out of reach.
_WHOLE_MATMULS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# To move activations to the host a layer earlier, libtpu takes one layer out of each loop. It then
# stacks the activations that stay by padding those of that layer: 4 % of a step (docs/log.md).
_WHOLE_LOOPS = {"xla_tpu_pipeline_memory_host_transfers": "false"}
_TPU_OPTIONS = _WHOLE_MATMULS | _WHOLE_LOOPS


def _tpu_options(vmem_kib: int) -> dict[str, str]:
  """Options with a limit on the fast memory that a fused matmul may take for its tiles.

  With libtpu's own limit, matmuls of a large model run at two thirds of the peak.
  """
  return _TPU_OPTIONS | {"xla_tpu_scoped_vmem_limit_kib": str(vmem_kib)}


# TPUs. 4 or 8 chips share the network of a host (100 to 400 Gbit/s).

register(
  Chip(
    name="v4",
    device_kinds=("TPU v4",),
    peak_flops=275e12,
    clock=1.05e9,
    flops_per_cycle=262_144,
    hbm=32 * GIB,
    hbm_limit=int(30.75 * GIB),
    hbm_bandwidth=1.228e12,
    ici_bandwidth=300e9,
    dcn_bandwidth=3.1e9,
    host_bandwidth=15e9,
    torus=3,
    cores=2,
    xla_options=_TPU_OPTIONS,
    libtpu="v4",
    libtpu_options={"chip_config_name": "megacore"},
  )
)
register(
  Chip(
    name="v5e",
    device_kinds=("TPU v5 lite", "TPU v5e"),
    peak_flops=197e12,
    clock=1.5e9,
    flops_per_cycle=131_072,
    hbm=16 * GIB,
    hbm_limit=int(15.75 * GIB),
    hbm_bandwidth=0.819e12,
    ici_bandwidth=200e9,
    dcn_bandwidth=3.1e9,
    host_bandwidth=15e9,
    torus=2,
    overlaps_gathers=True,
    xla_options=_tpu_options(65_536),
    libtpu="v5e",
  )
)
register(
  Chip(
    name="v5p",
    device_kinds=("TPU v5", "TPU v5p"),
    peak_flops=459e12,
    clock=1.75e9,
    flops_per_cycle=262_144,
    hbm=96 * GIB,
    hbm_limit=95 * GIB,
    hbm_bandwidth=2.765e12,
    ici_bandwidth=600e9,
    dcn_bandwidth=6.2e9,
    host_bandwidth=15e9,
    torus=3,
    cores=2,
    xla_options=_tpu_options(65_536),
    libtpu="v5p",
  )
)
register(
  Chip(
    name="v6e",
    device_kinds=("TPU v6 lite", "TPU v6e"),
    peak_flops=918e12,
    clock=1.75e9,
    flops_per_cycle=524_288,
    hbm=32 * GIB,
    hbm_limit=int(31.24 * GIB),
    hbm_bandwidth=1.640e12,
    ici_bandwidth=448e9,
    dcn_bandwidth=6.2e9,
    host_bandwidth=32e9,
    torus=2,
    matmul_rate=0.97,
    xla_options=_tpu_options(98_304),
    libtpu="v6e",
  )
)
register(
  Chip(
    name="tpu7x",
    device_kinds=("TPU7x",),
    peak_flops=2307e12 / 2,
    clock=2.2e9,
    flops_per_cycle=524_288,
    hbm=96 * GIB,
    hbm_limit=int(94.74 * GIB),
    hbm_bandwidth=3.69e12,
    ici_bandwidth=600e9,
    dcn_bandwidth=6.2e9,
    torus=3,
    cores=2,
    devices=2,
    xla_options=_tpu_options(65_536),
    libtpu="tpu7x",
  )
)


# GPUs. Each has a network card of its own: 200 Gbit/s in an A100's host, 400 Gbit/s since then.
# XLA may take this share of the memory (set in launch/); the rest is for CUDA, NCCL and cuDNN.
_GPU_MEMORY_FRACTION = 0.92


def register_gpu(
  name: str,
  gpu: GpuTarget,
  *,
  device_kinds: tuple[str, ...],
  peak_flops: float,
  clock: float,
  flops_per_core: int,
  nvlink: float,
  network: float,
  variant_flops: Mapping[str, float] | None = None,
) -> None:
  """Registers a GPU.

  Args:
    name: Name in a topology.
    gpu: Target description, with memory and cores.
    device_kinds: See `Chip`.
    peak_flops: Dense bf16 FLOP/s on the data sheet.
    clock: Clock rate in Hz behind that rate. `gpu.clock` is the boost clock.
    flops_per_core: Dense bf16 FLOPs per cycle and multiprocessor.
    nvlink: Bytes/s sent over NVLink (one direction).
    network: Bytes/s sent to other hosts.
    variant_flops: See `Chip`.
  """
  register(
    Chip(
      name=name,
      device_kinds=device_kinds,
      peak_flops=peak_flops,
      variant_flops=variant_flops or {},
      clock=clock,
      flops_per_cycle=gpu.cores * flops_per_core,
      hbm=gpu.memory,
      hbm_limit=int(gpu.memory * _GPU_MEMORY_FRACTION),
      hbm_bandwidth=gpu.bandwidth,
      ici_bandwidth=nvlink,
      dcn_bandwidth=network,
      matmul_rate=0.85,
      overlaps_gathers=True,
      gpu=gpu,
    )
  )


_H100 = GpuTarget(
  name="NVIDIA H100 80GB HBM3",
  capability=(9, 0),
  cores=132,
  fpus=128,
  clock=1.98e9,
  memory=84_942_979_072,
  bandwidth=3.352e12,
  cache=50 << 20,
  shared=228 << 10,
  links=18,
)

register_gpu(
  "a100",
  GpuTarget(
    name="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    cores=108,
    fpus=64,
    clock=1.41e9,
    memory=85_100_068_864,
    bandwidth=2.039e12,
    cache=40 << 20,
    shared=164 << 10,
    links=12,
  ),
  device_kinds=("NVIDIA A100",),
  peak_flops=312e12,
  clock=1.41e9,
  flops_per_core=2048,
  nvlink=300e9,
  network=25e9,
)
register_gpu(
  "h100",
  _H100,
  device_kinds=("NVIDIA H100",),
  peak_flops=989e12,
  variant_flops={"NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12},
  clock=1.83e9,
  flops_per_core=4096,
  nvlink=450e9,
  network=50e9,
)
register_gpu(
  "h200",
  dataclasses.replace(_H100, name="NVIDIA H200", memory=151_397_597_184, bandwidth=4.8e12),
  device_kinds=("NVIDIA H200",),
  peak_flops=989e12,
  variant_flops={"NVIDIA H200 NVL": 835e12},
  clock=1.83e9,
  flops_per_core=4096,
  nvlink=450e9,
  network=50e9,
)
register_gpu(
  "b200",
  GpuTarget(
    name="NVIDIA B200",
    capability=(10, 0),
    cores=148,
    fpus=128,
    clock=1.965e9,
    memory=191_514_411_008,
    bandwidth=7.672e12,
    cache=132_644_864,
    shared=228 << 10,
    links=18,
  ),
  device_kinds=("NVIDIA B200",),
  peak_flops=2250e12,
  clock=1.856e9,
  flops_per_core=8192,
  nvlink=900e9,
  network=50e9,
)
