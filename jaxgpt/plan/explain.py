"""A program that does not fit, in the words of the config."""

from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel.chips import GIB
from jaxgpt.plan import memory_estimate, per_device, search

_TRIES = 3  # of each kind of change: arithmetic may be too hopeful


def out_of_memory(error, c, topology):
  """Lines that say what takes the memory; the sizes are those of arithmetic.

  Args:
    error: a `lower.OutOfMemory`.
    c: the resolved config.
    topology: a `topology.Topology`.
  """
  needed = f"{error.needed / GIB:.2f} GiB" if error.needed else "more"
  yield (
    f"DOES NOT FIT: {topology.chip.name} has {error.limit / GIB:.2f} GiB for a program and its "
    f"state, which need {needed}"
  )
  yield ""
  yield "the largest arrays on a device (by arithmetic), and what makes them smaller"
  sizes = mesh_lib.axis_sizes(c.mesh, topology.num_devices)
  found = memory_estimate.buffers(c, sizes, per_device.count(c))
  for buffer in found[:8]:
    if buffer.bytes >= GIB / 100:
      yield f"  {buffer.bytes / GIB:6.2f} GiB  {buffer.name:<28} {buffer.shape:<26} {buffer.keys}"
  yield f"  {memory_estimate.peak(found) / GIB:6.2f} GiB  in all, at the worst moment"


def remedies(c, topology):
  """Lines: changes that make it fit, each compiled.

  Args:
    c, topology: as in `out_of_memory`.
  """
  yield ""
  yield "changes that should make it fit, compiled:"
  for ways in search.remedies(c, topology):
    for candidate in ways[:_TRIES]:
      flags = " ".join(f"--config.{key}={value}" for key, value in candidate.changes.items())
      result = search.compiled(candidate, topology)
      yield f"  {flags}: {search.verdict(result)}"
      if result.fits:
        break
