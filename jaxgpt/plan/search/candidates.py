"""Candidates of the search: configs with other meshes, remat policies and batches.

They are ranked by arithmetic (`time_estimate`, `memory_estimate`).
"""

import itertools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections

from jaxgpt.config import effects
from jaxgpt.config.keys.layer_kinds import mlp_kinds
from jaxgpt.config.remat import activations
from jaxgpt.errors import UserError
from jaxgpt.model import stacks, transformer
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel import sharding
from jaxgpt.plan import lower, memory_estimate, per_device, time_estimate
from jaxgpt.plan.topology import Topology
from jaxgpt.training import build, objectives

REMATS = (  # each saves more than the one before it
  "full",
  "save:attention",
  "save:q,k,v,attention",
  "save:q,k,v,attention,o",
  "save:q,k,v,attention,up",
  "save:q,k,v,attention,gate,up",
  "save:q,k,v,attention,o,gate,up",
)
OFFLOADS = (  # more rows fit with these
  "offload:q,k,v",
  "save:attention+offload:q,k,v",
  "offload:q,k,v,attention",
  "save:attention,gate,up+offload:q,k,v",
  "save:gate,up+offload:q,k,v,attention",
  "save:q,k,v,attention,gate,up+offload:input",
  "save:attention,gate,up+offload:input,q,k,v",
  "save:attention,up+offload:q,k,v",
  "save:attention,o,gate,up+offload:q,k,v",
  "save:o,gate,up+offload:q,k,v,attention",
)
_TENSORS = (1, 2, 4, 8)
_SEQS = (1, 2, 4, 8, 16)
_SEQ_UNIT = 256  # fewest tokens of a row per device
_EXPERTS = (1, 2, 4, 8, 16)
_STAGES = (1, 2, 4)
_ALONE = tuple((rows, 1) for rows in (1, 2, 3, 4, 6, 8, 12, 16))  # (rows, microbatches)
_LOSS_CHUNK = 2048  # `objective.loss_chunk` where the plan would not fit with whole logits
SLACK = 1.02  # the arithmetic is off by a few percent, so up to this factor is still compiled


class Candidate(NamedTuple):
  """A config to consider, with its estimates.

  Attributes:
    c: The resolved config with the changes.
    changes: {config key: value}.
    bytes: Estimated memory per device.
    merit: Estimated device-seconds per token.
  """

  c: ml_collections.ConfigDict
  changes: dict[str, Any]
  bytes: float
  merit: float


def changed(c: ml_collections.ConfigDict, changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """A resolved config with other values.

  Raises:
    UserError: The values contradict each other.
  """
  c = c.copy_and_resolve_references()
  c.unlock()
  c.update_from_flattened_dict(changes)
  return lower.resolve(c.lock())


def remats(m: ml_collections.ConfigDict, offload: bool = False) -> list[str]:
  """The policies to try for a model, without the activations that its layers do not have.

  Args:
    m: The `model` section. Training refuses a policy that names an activation it lacks.
    offload: Whether to try `OFFLOADS` too.
  """
  lacking = effects.lacking_activations(m)
  return list(dict.fromkeys(_without(remat, lacking) for remat in REMATS + OFFLOADS * offload))


def _without(remat: str, lacking: Collection[str]) -> str:
  """A policy without the activations that a model lacks."""
  lists, terms = activations(remat), []
  for word, names in (("save", lists.saved), ("offload", lists.offloaded)):
    if has := [name for name in names if name not in lacking]:
      terms.append(f"{word}:{','.join(has)}")
  return "+".join(terms) or remat


def meshes(c: ml_collections.ConfigDict, topology: Topology) -> list[dict[str, int]]:
  """Mesh sizes that suit a model and a topology, as [{axis: size}].

  Either `data` covers the slices or hosts, and the devices that fsdp cannot use, or fsdp takes
  their devices too, for a model that does not fit one of them. Then it covers them, or the stages
  do (`mesh.axis_over_slices`). In addition to fsdp and data, at most two axes are used at once.
  """
  m, within = c.model, topology.num_devices // topology.slices
  experts = [n for n in _EXPERTS if m.moe.experts % n == 0] if "moe" in mlp_kinds(m) else [1]
  lengths = [n for n in _SEQS if c.data.seq_len % (_SEQ_UNIT * n) == 0 or n == 1]
  out = []
  periods = stacks.pipelined_periods(m)
  stages = [n for n in _STAGES if n == 1 or (periods and periods % (n * c.mesh.stage_repeats) == 0)]
  # Each combination of the axes within a slice; fsdp and data share the devices that are left.
  for tensor, seq, expert, stage in itertools.product(_TENSORS, lengths, experts, stages):
    if sum(n > 1 for n in (tensor, seq, expert, stage)) > 2:
      continue
    left = within // (tensor * seq * expert * stage)
    if left * tensor * seq * expert * stage != within:
      continue
    for fsdp in _fsdp_sizes(left, topology.slices, m.width):
      out.append(
        {
          "data": topology.slices * left // fsdp,
          "fsdp": fsdp,
          "seq": seq,
          "tensor": tensor,
          "expert": expert,
          "stage": stage,
        }
      )
  return [sizes for sizes in out if _suits(c, sizes, topology.slices)]


def _suits(c: ml_collections.ConfigDict, sizes: Mapping[str, int], slices: int) -> bool:
  """Whether training builds the model on a mesh {axis: size}: `build.build` checks the same."""
  mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
  cfg = ml_collections.FrozenConfigDict(c.model)
  model = transformer.Transformer(cfg, rules=sharding.rules(c.mesh))
  try:
    mesh_lib.axis_over_slices(sizes, slices)
    build.check_qk_clip(c, sizes)
    build.check_heads(model, mesh)
    shapes, axes = transformer.abstract(model)
    sharding.params_shardings(axes, shapes, mesh, model.rules)
  except UserError:
    return False
  return True


def _fsdp_sizes(left: int, slices: int, width: int) -> list[int]:
  """Sizes of fsdp to try: none, the most within a slice, and the most over the slices.

  Args:
    left: Devices of a slice that fsdp and data share.
    slices: Slices, or hosts.
    width: `model.width`, which fsdp has to divide.
  """
  most = lambda n: max(i for i in range(1, n + 1) if n % i == 0 and width % i == 0)
  over = most(slices * left)
  sizes = {1, most(left)}
  # If data is still a multiple of the slices, then it is data that covers them.
  if (slices * left // over) % slices:
    sizes.add(over)
  return sorted(sizes)


def candidates(
  c: ml_collections.ConfigDict,
  topology: Topology,
  keep_batch: bool = False,
  offload: bool = False,
) -> list[Candidate]:
  """All candidates for a config on a topology, the best estimate first.

  Args:
    c: A resolved config.
    topology: The hardware.
    keep_batch: Keeps data.batch_size as it is, with gradient accumulation where needed.
    offload: Whether to try the policies of `OFFLOADS` too.
  """
  counts = per_device.count(c)
  found = []
  for sizes, remat in itertools.product(meshes(c, topology), remats(c.model, offload)):
    shards = mesh_lib.num_batch_shards(sizes)
    of_pipelines = {} if sizes["stage"] > 1 else _of_pipelines(c)
    for rows, accumulate in _rows(c.data.batch_size, shards) if keep_batch else _ALONE:
      batch = rows * shards * accumulate
      changes: dict[str, Any] = {f"mesh.{axis}": size for axis, size in sizes.items()}
      changes |= of_pipelines
      changes |= {"model.remat": remat, "data.batch_size": batch, "optim.accumulate": accumulate}
      if c.eval.batch_size == c.data.batch_size or c.eval.batch_size % shards:
        changes["eval.batch_size"] = batch
      try:
        build.check_remat(remat, sizes)
        one = _estimated(changed(c, changes), changes, sizes, counts, topology)
        if one.bytes > limit(topology) * SLACK and _takes_chunks(one.c, sizes):
          changes = changes | {"objective.loss_chunk": _LOSS_CHUNK}
          cut = _estimated(changed(c, changes), changes, sizes, counts, topology)
          one = min(one, cut, key=lambda one: one.bytes)
      except UserError:  # such as a layer pattern that does not suit the mesh
        continue
      found.append(one)
  return sorted(found, key=lambda one: (one.merit, "offload" in one.c.model.remat))


def _takes_chunks(c: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> bool:
  """Whether the loss can be computed in chunks of `_LOSS_CHUNK` tokens and is not yet."""
  able = objectives.find(c).loss_chunk and not c.objective.loss_chunk
  return able and per_device.share(c, sizes).tokens > _LOSS_CHUNK


def _rows(batch_size: int, shards: int) -> list[tuple[int, int]]:
  """All (rows per device, microbatches) that give a batch. None if the shards do not divide it."""
  if batch_size % shards:
    return []
  each = batch_size // shards
  return [(rows, each // rows) for rows in range(1, each + 1) if each % rows == 0]


def _of_pipelines(c: ml_collections.ConfigDict) -> dict[str, Any]:
  """Changes for a mesh without stages: training refuses keys of pipelines that have no effect."""
  defaults = {"stage_repeats": 1, "stage_microbatches": 0}
  return {f"mesh.{key}": value for key, value in defaults.items() if c.mesh[key] != value}


def _estimated(
  c: ml_collections.ConfigDict,
  changes: dict[str, Any],
  sizes: Mapping[str, int],
  counts: per_device.Counts,
  topology: Topology,
) -> Candidate:
  took = time_estimate.seconds(c, sizes, counts, topology)
  return Candidate(
    c,
    changes,
    memory_estimate.peak(memory_estimate.buffers(c, sizes, counts, topology.chip)),
    sum(took.values()) * topology.num_devices / per_device.tokens_of_step(c),
  )


def limit(topology: Topology) -> int:
  """Bytes that a program may take on a device of a topology."""
  assert topology.chip is not None, "the search needs a chip from the table"
  return topology.chip.hbm_limit
