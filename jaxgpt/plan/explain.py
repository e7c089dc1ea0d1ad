"""Explanations of a program that does not fit, in terms of config keys."""

import contextlib
from collections.abc import Iterator
from typing import Any

import ml_collections

from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel.chips import GIB
from jaxgpt.plan import lower, memory_estimate, per_device
from jaxgpt.plan.lower import OutOfMemory
from jaxgpt.plan.search import candidates, search
from jaxgpt.plan.search.candidates import Candidate
from jaxgpt.plan.topology import Topology

_TRIES = 3  # changes to compile per kind: the arithmetic may be too optimistic
_SHOWN = 8  # arrays to list
_MARGIN = 0.98  # share of the memory that an estimate may take, since it is off by a few percent


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
  yield from lower.other_attention(*lower.attention_forms(c, topology))
  yield ""
  yield "the largest arrays on a device (estimated), and the config keys that make them smaller"
  sizes = mesh_lib.axis_sizes(c.mesh, topology.num_devices)
  found = memory_estimate.buffers(c, sizes, per_device.count(c), topology.chip)
  for buffer in found[:_SHOWN]:
    if buffer.bytes >= GIB / 100:
      yield f"  {buffer.bytes / GIB:6.2f} GiB  {buffer.name:<28} {buffer.shape:<26} {buffer.keys}"
  yield f"  {memory_estimate.peak(found) / GIB:6.2f} GiB  in total, at the worst moment"


def changes(c: ml_collections.ConfigDict, topology: Topology) -> Iterator[list[Candidate]]:
  """Changes to a config that does not fit, one list per kind of change, the smallest change first.

  The kinds: save fewer activations, split the batch into more microbatches, use fewer rows. Lists
  hold only candidates that should fit, and that take less memory than the config does.
  """
  assert topology.chip is not None
  chip, sizes = topology.chip, mesh_lib.axis_sizes(c.mesh, topology.num_devices)
  counts = per_device.count(c)
  estimate = lambda c: memory_estimate.peak(memory_estimate.buffers(c, sizes, counts, chip))
  most = min(chip.hbm_limit * _MARGIN, estimate(c) - 1)
  rows = c.data.batch_size // mesh_lib.num_batch_shards(sizes) // c.optim.accumulate
  halvings = [2**i for i in range(1, 8) if rows % 2**i == 0]
  kinds: tuple[list[dict[str, Any]], ...] = (
    [{"model.remat": remat} for remat in reversed(candidates.remats(c.model))],
    [{"optim.accumulate": c.optim.accumulate * n} for n in halvings],
    [{"data.batch_size": c.data.batch_size // n} for n in halvings],
  )
  for kind in kinds:
    sized = []
    for change in kind:
      with contextlib.suppress(UserError):  # a change may contradict another value of the config
        one = candidates.changed(c, change)
        sized.append(Candidate(one, change, estimate(one), 0.0))
    yield [one for one in sized if one.bytes <= most]


def remedies(c: ml_collections.ConfigDict, topology: Topology) -> Iterator[str]:
  """Lines with changes to the config that make it fit. Each change is compiled.

  Args:
    c: The resolved config.
    topology: The hardware.
  """
  yield ""
  kinds = [kind for kind in changes(c, topology) if kind]
  if not kinds:
    yield (
      "no change of model.remat, optim.accumulate or data.batch_size alone should make it fit: use "
      "more devices or another mesh (--search), or shorter rows (data.seq_len)"
    )
    return
  yield "changes that should make it fit, compiled:"
  for kind in kinds:
    for candidate in kind[:_TRIES]:
      flags = " ".join(f"--config.{key}={value}" for key, value in candidate.changes.items())
      result = search.compiled(candidate, topology)
      yield f"  {flags}: {search.verdict(result)}"
      if result.fits:
        break
