"""GPUs as XLA wants them described where there is none: a GpuTargetConfig as text.

Sources: NVIDIA's data sheets (memory, bandwidths, links, clocks) and the table of compute
capabilities in the CUDA programming guide (threads, registers, shared memory).
"""

import re
from typing import NamedTuple

from jaxgpt.config import installed


class Gpu(NamedTuple):
  """A kind of GPU.

  Attributes:
    name: as its driver says it.
    capability: compute capability, (major, minor).
    cores: streaming multiprocessors.
    fpus: float32 units of one.
    clock: cycles a second, at most.
    memory: bytes, as the driver says.
    bandwidth: bytes a second of the memory.
    cache: bytes of the L2 cache.
    shared: bytes of shared memory of a multiprocessor.
    links: NVLinks.
  """

  name: str
  capability: tuple
  cores: int
  fpus: int
  clock: float
  memory: int
  bandwidth: float
  cache: int
  shared: int
  links: int


A100 = Gpu(
  "NVIDIA A100-SXM4-80GB",
  (8, 0),
  108,
  64,
  1.41e9,
  85_100_068_864,
  2.039e12,
  40 << 20,
  164 << 10,
  12,
)
H100 = Gpu(
  "NVIDIA H100 80GB HBM3",
  (9, 0),
  132,
  128,
  1.98e9,
  84_942_979_072,
  3.352e12,
  50 << 20,
  228 << 10,
  18,
)
H200 = H100._replace(name="NVIDIA H200", memory=151_397_597_184, bandwidth=4.8e12)
B200 = Gpu(
  "NVIDIA B200", (10, 0), 148, 128, 1.965e9, 191_514_411_008, 7.672e12, 132_644_864, 228 << 10, 18
)

_RESERVED = 1 << 10  # of shared memory, for each block
# What is the same in all of them.
_LIMITS = {
  "threads_per_block_limit": 1024,
  "threads_per_warp": 32,
  "threads_per_core_limit": 2048,
  "shared_memory_per_block": 48 << 10,
  "registers_per_core_limit": 65_536,
  "registers_per_block_limit": 65_536,
  "block_dim_limit_x": 2**31 - 1,
  "block_dim_limit_y": 65_535,
  "block_dim_limit_z": 65_535,
  "thread_dim_limit_x": 1024,
  "thread_dim_limit_y": 1024,
  "thread_dim_limit_z": 64,
}


def target_config(gpu):
  """The text of XLA's GpuTargetConfigProto, with the installed versions of CUDA and cuDNN.

  Args:
    gpu: a `Gpu`.
  """
  numbers = _LIMITS | {
    "core_count": gpu.cores,
    "fpus_per_core": gpu.fpus,
    "clock_rate_ghz": gpu.clock / 1e9,
    "device_memory_size": gpu.memory,
    "memory_bandwidth": int(gpu.bandwidth),
    "l2_cache_size": gpu.cache,
    "shared_memory_per_core": gpu.shared,
    "shared_memory_per_block_optin": gpu.shared - _RESERVED,
  }
  major, minor = gpu.capability
  features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"  # sm_90a and not sm_90
  lines = [f"  {key}: {value}" for key, value in numbers.items()]
  return "\n".join(
    [
      "gpu_device_info {",
      *lines,
      f"  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}",
      f'  device_vendor: "NVIDIA Corporation" name: "{gpu.name}"',
      f"  device_interconnect_info {{ active_links: {gpu.links} }}",
      "}",
      f'platform_name: "CUDA" device_description_str: "{gpu.name}"',
      f"dnn_version_info {{ {_version('nvidia-cudnn-cu13')} }}",
      f"runtime_version {{ {_version('nvidia-cuda-runtime')} }}",
    ]
  )


def _version(package):
  """'major: 9 minor: 12 patch: 0' of an installed package."""
  numbers = re.findall(r"\d+", installed.version(package) or "0")[:3]
  return " ".join(f"{key}: {n}" for key, n in zip(("major", "minor", "patch"), numbers))
