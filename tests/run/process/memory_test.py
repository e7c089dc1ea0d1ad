"""Memory at a log line: what this process holds, and what devices tell."""

import subprocess
import sys

import jax
import pytest

from jaxgpt.run.process import memory


class Device:
  """A device whose allocator has some counters."""

  def __init__(self, stats):
    self._stats = stats

  def memory_stats(self):
    if isinstance(self._stats, Exception):
      raise self._stats
    return self._stats


# In a process of its own: here, threads of other tests give memory back meanwhile.
GROWTH = """
import numpy as np
from jaxgpt.run.process import memory

before = memory.host_bytes()
held = np.ones(16 << 20)  # 128 MiB
print(memory.host_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_host_memory_grows_with_what_is_held():
  ran = subprocess.run([sys.executable, "-c", GROWTH], check=True, capture_output=True)
  assert 120e6 < int(ran.stdout) < 200e6


def test_the_fullest_device_counts(monkeypatch):
  monkeypatch.setattr(memory, "host_bytes", lambda: None)
  counters = lambda now, most: {"bytes_in_use": now, "peak_bytes_in_use": most, "num_allocs": 3}
  some = [Device(counters(5, 9)), Device(counters(7, 8))]
  assert memory.used(some) == {"device_memory": 7, "device_memory_peak": 9}
  assert memory.used([Device({"bytes_in_use": 4})]) == {"device_memory": 4}


def test_backends_that_tell_nothing_are_left_out():
  untold = [Device(None), Device(jax.errors.JaxRuntimeError("UNIMPLEMENTED"))]
  assert not memory.used(untold).keys() & {"device_memory", "device_memory_peak"}


def test_a_system_without_proc_is_left_out(monkeypatch, tmp_path):
  monkeypatch.setattr(memory, "_STATM", tmp_path / "none")
  assert memory.used([]) == {}
