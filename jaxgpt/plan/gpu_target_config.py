"""XLA's description of a GPU that is not present: a GpuTargetConfigProto as text."""

import re

from jaxgpt.config import installed
from jaxgpt.errors import UserError
from jaxgpt.parallel import chips

NEEDS = (
  "a plan for GPUs needs JAX's CUDA plugin and NVIDIA's libraries: pip install 'jaxgpt[cuda]' "
  "(Linux; neither a GPU nor a driver is needed)"
)
_RESERVED = 1 << 10  # bytes of shared memory that CUDA reserves per block
# JAX's CUDA plugins, and the packages that bring cuDNN and the CUDA runtime for each.
_LIBRARIES = {
  "jax-cuda13-plugin": ("nvidia-cudnn-cu13", "nvidia-cuda-runtime"),
  "jax-cuda12-plugin": ("nvidia-cudnn-cu12", "nvidia-cuda-runtime-cu12"),
}
# Limits that all supported GPUs share; from the table of compute capabilities in the CUDA guide.
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


def target_config(gpu: chips.GpuTarget) -> str:
  """The text of XLA's GpuTargetConfigProto, with the installed versions of CUDA and cuDNN.

  Raises:
    UserError: JAX's CUDA plugin or one of these libraries is not installed.
  """
  plugin = next(filter(installed.version, _LIBRARIES), None)
  if plugin is None:
    raise UserError(NEEDS)
  cudnn, runtime = (_version(plugin, package) for package in _LIBRARIES[plugin])
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
      f"  cuda_compute_capability {{ major: {major} minor: {minor} "
      f"feature_extension: {features} }}",
      f'  device_vendor: "NVIDIA Corporation" name: "{gpu.name}"',
      f"  device_interconnect_info {{ active_links: {gpu.links} }}",
      "}",
      f'platform_name: "CUDA" device_description_str: "{gpu.name}"',
      f"dnn_version_info {{ {cudnn} }}",
      f"runtime_version {{ {runtime} }}",
    ]
  )


def _version(plugin: str, package: str) -> str:
  """The version of a plugin's library in the form 'major: 9 minor: 12 patch: 0'."""
  version = installed.version(package)
  if version is None:
    raise UserError(
      f"a plan for GPUs with {plugin} reads the version of {package}, which is not installed: pip "
      f"install {package}"
    )
  numbers = re.findall(r"\d+", version)[:3]
  return " ".join(f"{key}: {n}" for key, n in zip(("major", "minor", "patch"), numbers))
