"""Search for the mesh, remat policy and batch that make a step fastest per token.

Candidates are ranked by arithmetic (`time_estimate`, `memory_estimate`). The best that should fit
are compiled. The best of those that should not fit is compiled too, to show that it does not.
"""

import collections
import itertools
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from jaxgpt.config import MESH_AXES, effects
from jaxgpt.config.remat import activations
from jaxgpt.errors import UserError, first_line
from jaxgpt.model import stacks
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel.chips import GIB
from jaxgpt.plan import lower, memory_estimate, per_device, report, time_estimate
from jaxgpt.plan.schedule.kernels import ASSUMED_RATE
from jaxgpt.plan.topology import Topology
from jaxgpt.training import objectives

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
_MATERIALIZE = ("values", "gradients")
_TENSORS = (1, 2, 4, 8)
_SEQS = (1, 2, 4, 8, 16)
_SEQ_UNIT = 256  # fewest tokens of a row per device
_EXPERTS = (1, 2, 4, 8, 16)
_STAGES = (1, 2, 4)
_ALONE = tuple((rows, 1) for rows in (1, 2, 3, 4, 6, 8, 12, 16))  # (rows, microbatches)
_LOSS_CHUNK = 2048  # `objective.loss_chunk` where the plan would not fit with whole logits
_OF_MEMORY = ("model.remat", "objective.loss_chunk")
_FINALISTS = 6
_SLACK = 1.02  # the arithmetic is off by a few percent, so up to this factor is still compiled


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


class Result(NamedTuple):
  """A compiled candidate: its figures, or the reason that it does not fit or is refused."""

  candidate: Candidate
  figures: dict[str, Any] | None
  error: lower.OutOfMemory | UserError | None

  @property
  def fits(self) -> bool:
    """Whether it compiled and fits the memory of a device."""
    return self.figures is not None and self.figures["memory"]["fits"]

  @property
  def gib(self) -> str:
    """Memory per device in GiB, as text, or '-' if it is not known."""
    if self.figures:
      return f"{self.figures['memory']['total'] / GIB:.2f}"
    return f"{needed / GIB:.2f}" if (needed := getattr(self.error, "needed", 0)) else "-"


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

  Either `data` covers the slices or hosts, and the devices that fsdp cannot use, or fsdp covers
  them, for a model that does not fit one of them. The other axes stay within a slice. In addition
  to fsdp and data, at most two axes are used at once.
  """
  m, within = c.model, topology.num_devices // topology.slices
  experts = [n for n in _EXPERTS if m.moe.experts % n == 0] if "moe" in m.mlp_pattern else [1]
  lengths = [n for n in _SEQS if c.data.seq_len % (_SEQ_UNIT * n) == 0 or n == 1]
  out = []
  periods = stacks.pipelined_periods(m)
  stages = [n for n in _STAGES if n == 1 or (periods and periods % (n * c.mesh.stage_repeats) == 0)]
  # Each combination of the axes within a slice; fsdp and data share the devices that are left.
  for tensor, seq, expert, stage in itertools.product(_TENSORS, lengths, experts, stages):
    if m.num_kv_heads % tensor or m.mlp_width % tensor or m.vocab_size % tensor:
      continue
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
  return out


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
  if over % slices == 0 and (slices * left // over) % slices:
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
        one = _estimated(changed(c, changes), changes, sizes, counts, topology)
        if one.bytes > _limit(topology) * _SLACK and _takes_chunks(one.c, sizes):
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


def choose(
  found: Sequence[Candidate], limit: float, finalists: int
) -> tuple[list[Candidate], Candidate | None]:
  """Chooses the candidates to compile.

  For each mesh and number of rows these are the two best remat policies, one after the other: if
  memory is scarce the compiler recomputes on its own, and the policy that saves less is faster. Of
  policies that keep the same activations, on the device or the host, only the first counts.

  Args:
    found: From `candidates`, sorted as there.
    limit: Bytes of a device.
    finalists: Number of candidates to compile.

  Returns:
    (candidates, the smallest of those that should be faster but should not fit, or None).
  """
  groups: dict[tuple[Any, ...], dict[frozenset[str], Candidate]] = collections.defaultdict(dict)
  for one in found:
    if one.bytes <= limit * _SLACK:
      kept = frozenset(per_device.kept_names(one.c.model.remat))
      same = groups[tuple(v for k, v in one.changes.items() if k not in _OF_MEMORY)]
      same.setdefault(kept, one)
  fitting = [one for same in groups.values() for one in list(same.values())[:2]]
  beyond = [
    one
    for one in found
    if one.bytes > limit * _SLACK and (not fitting or one.merit < fitting[0].merit)
  ]
  return fitting[:finalists], min(beyond, key=lambda one: one.bytes, default=None)


def search(
  c: ml_collections.ConfigDict,
  topology: Topology,
  finalists: int | None = None,
  keep_batch: bool = False,
  offload: bool = False,
  say: Callable[[str], None] = print,
  run: Callable[[Candidate, Topology], Result] | None = None,
  show: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> list[Result]:
  """Compiles the most promising candidates.

  Args:
    c: A resolved config.
    topology: The hardware.
    finalists: Number of candidates to compile. None: 6.
    keep_batch, offload: See `candidates`.
    say: Receives lines on the progress.
    run: Compiles a candidate. None: `compiled`.
    show: Called before each candidate is compiled, with the number of those that are done, of all
      that are known by now, and a description of it.

  Returns:
    The results that fit, the best first, then the others.

  Raises:
    UserError: No mesh suits the model and the batch, or it is not known how fast the chip's link to
      the host is.
  """
  run, limit = run or compiled, _limit(topology)
  if offload and topology.chip and not topology.chip.host_bandwidth:
    raise UserError(
      f"--offload: the chip table has no bandwidth from {topology.chip.name} to the host's memory, "
      "so such plans cannot be compared; leave it out, or enter host_bandwidth for the chip"
    )
  found = candidates(c, topology, keep_batch, offload)
  if not found:
    raise UserError(
      f"data.batch_size={c.data.batch_size}: no mesh over {topology.num_devices} devices suits "
      "this model and batch" + ("; leave --keep-batch out" if keep_batch else "")
    )
  chosen, beyond = choose(found, limit, finalists or _FINALISTS)
  say(
    f"{len(found)} candidates, {sum(1 for one in found if one.bytes <= limit)} should fit; "
    f"compiling {len(chosen)}" + (" and one that should not" if beyond else "")
  )
  assumed = [one for one in chosen if time_estimate.assumes_kernels(one.c, topology)]
  if assumed:
    say(
      f"attention kernels are ranked at {ASSUMED_RATE:.0%} of peak in {len(assumed)} of these: no "
      "blocks are measured for this chip, or for these heads and lengths"
    )
  work = _Work(topology, say, show, run)
  first = chosen + ([beyond] if beyond else [])
  for number, one in enumerate(first, 1):
    work.compile(one, len(first) - number + len(_MATERIALIZE) - 1)
  best = min(work.results, key=_rank)
  if best.fits:  # which of these suits a chip is not known before compiling
    for value in _MATERIALIZE:
      if value != best.candidate.c.model.materialize:
        work.refine(best.candidate, {"model.materialize": value})
  if not any(r.fits for r in work.results):
    _retreat(found, work)
  return sorted(work.results, key=_rank)


class _Work:
  """Compiles candidates one after another, and tells of it.

  Attributes:
    results: The results so far.
  """

  def __init__(
    self,
    topology: Topology,
    say: Callable[[str], None],
    show: Callable[[int, int, str], None],
    run: Callable[[Candidate, Topology], Result],
  ):
    """Args as in `search`."""
    self._topology, self._say, self._show, self._run = topology, say, show, run
    self.results: list[Result] = []

  def compile(self, one: Candidate, more: int = 0) -> Result:
    """Compiles a candidate. `more` is the number of those that come after it."""
    done = len(self.results)
    self._show(done, done + 1 + more, describe(one.changes))
    return self._add(self._run(one, self._topology))

  def refine(self, one: Candidate, changes: dict[str, Any]) -> Result:
    """Compiles a candidate with further changes. Its estimates stay as they are."""
    one = one._replace(changes=one.changes | changes)
    try:
      return self.compile(one._replace(c=changed(one.c, changes)))
    except UserError as e:  # the changes contradict the config
      return self._add(Result(one, None, e))

  def _add(self, result: Result) -> Result:
    self.results.append(result)
    self._say(f"  {describe(result.candidate.changes)}: {verdict(result)}")
    return result


def _limit(topology: Topology) -> int:
  assert topology.chip is not None, "the search needs a chip from the table"
  return topology.chip.hbm_limit


def _rank(result: Result) -> tuple[bool, float]:
  """Sort key: results that fit first, then seconds per token."""
  if result.fits and result.figures:
    return (False, result.figures["merit_with_kernels"])
  return (True, result.candidate.merit)


def _retreat(found: Sequence[Candidate], work: _Work, tries: int = 3) -> None:
  """Compiles smaller candidates until one fits, where the arithmetic was too optimistic."""
  least = min((r.candidate.bytes for r in work.results), default=0)
  for one in [o for o in found if o.bytes < 0.93 * least][:tries]:
    if work.compile(one).fits:
      break


def compiled(candidate: Candidate, topology: Topology) -> Result:
  """Compiles a candidate. One that is refused or fails becomes a result too, with the reason."""
  try:
    step = lower.compile_step(candidate.c, topology)
    return Result(candidate, report.figures(step, topology), None)
  except (lower.OutOfMemory, UserError) as e:
    return Result(candidate, None, e)
  except Exception as e:  # a compiler's error must not discard the results of the others
    return Result(candidate, None, UserError(f"{type(e).__name__}: {first_line(e)}"))


def describe(changes: Mapping[str, Any]) -> str:
  """A candidate in a few words: its mesh, rows per data shard x microbatches, and remat policy."""
  sizes = {axis: changes[f"mesh.{axis}"] for axis in MESH_AXES}
  axes = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
  rows = changes["data.batch_size"] // changes["optim.accumulate"]
  rows //= mesh_lib.num_batch_shards(sizes)
  again = f" x {changes['optim.accumulate']}" if changes["optim.accumulate"] > 1 else ""
  return f"{axes or 'one device'}, {rows}{again} rows, {changes['model.remat']}" + "".join(
    f", {key.partition('.')[2]} {changes[key]}"
    for key in ("objective.loss_chunk", "model.materialize")
    if key in changes
  )


def verdict(result: Result) -> str:
  """The outcome of compiling, in a few words."""
  if isinstance(result.error, UserError):
    return f"refused: {result.error}"
  if result.error:
    return f"does not fit, needs {result.gib} of {result.error.limit / GIB:.2f} GiB"
  assert result.figures is not None, "a result without an error has figures"
  f = result.figures
  return (
    f"{f['tokens_per_second_per_chip']:,.0f} tokens/s per chip, MFU {f['mfu']:.1%}, "
    f"{result.gib} GiB" + ("" if f["memory"]["fits"] else ", does not fit")
  )


_LOST_BY = {
  "matmul": "slower or recomputed matmuls",
  "other": "more work outside matmuls",
  "unestimated": "more work without an estimate",
  "kernels": "attention kernels run more often",
  "exposed": "more exposed collectives",
  "unhidden": "gathers longer than the compute that overlaps them",
  "between": "more traffic between slices",
  "host": "activations moved to the host for longer than the compute that overlaps them",
}


def why(result: Result, best: Result) -> str:
  """The reason that a result lost against the best: the part of a token's time that grew most."""
  if isinstance(result.error, UserError):
    return str(result.error)
  if not result.fits or result.figures is None or best.figures is None:
    return "too much memory"
  a, b = best.figures, result.figures
  per_token = lambda f, key: f["seconds"].get(key, 0.0) / f["batch_size"] * 1e6
  key = max(_LOST_BY, key=lambda k: per_token(b, k) - per_token(a, k))
  return f"{b['merit_with_kernels'] / a['merit_with_kernels'] - 1:+.1%}: {_LOST_BY[key]}"


def table(results: Sequence[Result]) -> Iterator[str]:
  """Lines with the results of `search`, and the flags for the best one."""
  best = results[0]
  width = max(len(describe(r.candidate.changes)) for r in results)
  yield ""
  yield f"{'plan':<{width}} {'tokens/s':>9} {'MFU':>6} {'GiB':>6} {'est.':>6}"
  for r in results:
    f = r.figures
    found = (
      f"{f['tokens_per_second_per_chip']:>9,.0f} {f['mfu']:>6.1%}" if f else f"{'-':>9} {'-':>6}"
    )
    note = "best" if r is best and r.fits else why(r, best)
    yield (
      f"{describe(r.candidate.changes):<{width}} {found} {r.gib:>6} "
      f"{r.candidate.bytes / GIB:>6.2f}  {note}"
    )
  yield ""
  if not best.fits:
    if all(isinstance(r.error, UserError) for r in results):
      yield "all of the candidates were refused, for the reasons above"
    else:
      yield "none of the candidates fits: take more devices, or shorter rows (data.seq_len)"
    return
  yield "to train with the best, add:"
  yield " ".join(
    shlex.quote(f"--config.{key}={value}") for key, value in best.candidate.changes.items()
  )
