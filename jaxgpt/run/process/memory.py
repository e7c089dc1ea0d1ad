"""Memory of a run at a log line: of this process on the host, and of its devices.

Metrics of the first process are written, so the host is its host, and the devices are its devices.
"""

import os
import pathlib
from collections.abc import Sequence

import jax

HOST, DEVICE, DEVICE_PEAK = "host_memory", "device_memory", "device_memory_peak"
# The names of `used`. They differ between two runs of the same numbers.
METRICS = (HOST, DEVICE, DEVICE_PEAK)
_STATM = pathlib.Path("/proc/self/statm")
_COUNTERS = {DEVICE: "bytes_in_use", DEVICE_PEAK: "peak_bytes_in_use"}  # of the allocator


def used(devices: Sequence[jax.Device]) -> dict[str, int]:
  """Memory in use, in bytes, as far as the system and the backend tell it.

  Neither waits for the devices.

  Args:
    devices: Devices of this process.

  Returns:
    'host_memory': the resident memory of this process (Linux). 'device_memory' of the fullest
    device, and 'device_memory_peak' since the start of the process (GPU and TPU).
  """
  host = host_bytes()
  stats = [_stats(device) for device in devices]
  out = {} if host is None else {HOST: host}
  for name, counter in _COUNTERS.items():
    if found := [one[counter] for one in stats if counter in one]:
      out[name] = max(found)
  return out


def host_bytes() -> int | None:
  """Resident memory of this process, or None where the system has no /proc."""
  try:
    pages = int(_STATM.read_text().split()[1])
  except (OSError, ValueError, IndexError):
    return None
  return pages * os.sysconf("SC_PAGE_SIZE")


def _stats(device: jax.Device) -> dict[str, int]:
  """The counters of a device's allocator, {} if the backend has none."""
  try:
    return device.memory_stats() or {}
  except jax.errors.JaxRuntimeError:  # a backend without them: no reason to end a run
    return {}
