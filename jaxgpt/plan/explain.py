"""Explanations of a program that does not fit, in terms of config keys."""

from collections.abc import Iterator

import ml_collections

from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel.chips import GIB
from jaxgpt.plan import memory_estimate, per_device, search
from jaxgpt.plan.lower import OutOfMemory
from jaxgpt.plan.topology import Topology

_TRIES = 3  # changes to compile per kind: the arithmetic may be too optimistic
_SHOWN = 8  # arrays to list


def out_of_memory(
  error: OutOfMemory, c: ml_collections.ConfigDict, topology: Topology
) -> Iterator[str]:
  """Lines that list the largest arrays, with estimated sizes.

  Args:
    error: The compiler's verdict.
    c: The resolved config.
    topology: The hardware.
  """
  assert topology.chip is not None
  needed = f"{error.needed / GIB:.2f} GiB" if error.needed else "more"
  yield (
    f"DOES NOT FIT: {topology.chip.name} has {error.limit / GIB:.2f} GiB for a program and its "
    f"state, which need {needed}"
  )
  yield ""
  yield "the largest arrays on a device (estimated), and the config keys that make them smaller"
  sizes = mesh_lib.axis_sizes(c.mesh, topology.num_devices)
  found = memory_estimate.buffers(c, sizes, per_device.count(c), topology.chip)
  for buffer in found[:_SHOWN]:
    if buffer.bytes >= GIB / 100:
      yield f"  {buffer.bytes / GIB:6.2f} GiB  {buffer.name:<28} {buffer.shape:<26} {buffer.keys}"
  yield f"  {memory_estimate.peak(found) / GIB:6.2f} GiB  in total, at the worst moment"


def remedies(c: ml_collections.ConfigDict, topology: Topology) -> Iterator[str]:
  """Lines with changes to the config that make it fit. Each change is compiled.

  Args:
    c: The resolved config.
    topology: The hardware.
  """
  yield ""
  yield "changes that should make it fit, compiled:"
  for kind in search.remedies(c, topology):
    for candidate in kind[:_TRIES]:
      flags = " ".join(f"--config.{key}={value}" for key, value in candidate.changes.items())
      result = search.compiled(candidate, topology)
      yield f"  {flags}: {search.verdict(result)}"
      if result.fits:
        break
