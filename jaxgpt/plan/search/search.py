"""Search for the mesh, remat policy and batch that make a step fastest per token.

Of the ranked candidates (`candidates`), the best that should fit are compiled. The best of those
that should not fit is compiled too, to show that it does not.
"""

import collections
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from jaxgpt.config import MESH_AXES
from jaxgpt.errors import UserError, first_line
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel.chips import GIB
from jaxgpt.plan import lower, per_device, report, time_estimate
from jaxgpt.plan.schedule.kernels import ASSUMED_RATE
from jaxgpt.plan.search import candidates
from jaxgpt.plan.search.candidates import Candidate
from jaxgpt.plan.topology import Topology

_MATERIALIZE = ("values", "gradients")
_OF_MEMORY = ("model.remat", "objective.loss_chunk")
_FINALISTS = 6


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


def choose(
  found: Sequence[Candidate], limit: float, finalists: int
) -> tuple[list[Candidate], Candidate | None]:
  """Chooses the candidates to compile.

  For each mesh and number of rows these are the two best remat policies, one after the other: if
  memory is scarce the compiler recomputes on its own, and the policy that saves less is faster. Of
  policies that keep the same activations, on the device or the host, only the first counts.

  Args:
    found: From `candidates.candidates`, sorted as there.
    limit: Bytes of a device.
    finalists: Number of candidates to compile.

  Returns:
    (candidates, the smallest of those that should be faster but should not fit, or None).
  """
  groups: dict[tuple[Any, ...], dict[frozenset[str], Candidate]] = collections.defaultdict(dict)
  for one in found:
    if one.bytes <= limit * candidates.SLACK:
      kept = frozenset(per_device.kept_names(one.c.model.remat))
      same = groups[tuple(v for k, v in one.changes.items() if k not in _OF_MEMORY)]
      same.setdefault(kept, one)
  fitting = [one for same in groups.values() for one in list(same.values())[:2]]
  beyond = [
    one
    for one in found
    if one.bytes > limit * candidates.SLACK and (not fitting or one.merit < fitting[0].merit)
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
    keep_batch, offload: See `candidates.candidates`.
    say: Receives lines on the progress.
    run: Compiles a candidate. None: `compiled`.
    show: Called before each candidate is compiled, with the number of those that are done, of all
      that are known by now, and a description of it.

  Returns:
    The results that fit, the best first, then the others.

  Raises:
    UserError: No mesh suits the model and the batch, the chip cannot run `model.attention`, or it
      is not known how fast its link to the host is.
  """
  run, limit = run or compiled, candidates.limit(topology)
  if offload and topology.chip and not topology.chip.host_bandwidth:
    raise UserError(
      f"--offload: the chip table has no bandwidth from {topology.chip.name} to the host's memory, "
      "so such plans cannot be compared; leave it out, or enter host_bandwidth for the chip"
    )
  for line in lower.other_attention(*lower.attention_forms(c, topology)):
    say(line)
  found = candidates.candidates(c, topology, keep_batch, offload)
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
      return self.compile(one._replace(c=candidates.changed(one.c, changes)))
    except UserError as e:  # the changes contradict the config
      return self._add(Result(one, None, e))

  def _add(self, result: Result) -> Result:
    self.results.append(result)
    self._say(f"  {describe(result.candidate.changes)}: {verdict(result)}")
    return result


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
