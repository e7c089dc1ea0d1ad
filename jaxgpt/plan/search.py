"""Looks for the mesh, what to save, and the rows a device that make a step fastest per token.

All candidates are ranked by `time_estimate`; the best that should fit are compiled, and so is the best of
those that should not, to show that it does not.
"""

import collections
import contextlib
import itertools
from typing import Any, NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.parallel.chips import GIB
from jaxgpt.plan import lower, memory_estimate, per_device, report, time_estimate

REMATS = (
  "full",
  "save:attention",
  "save:q,k,v,attention",
  "save:q,k,v,attention,o",
  "save:q,k,v,attention,up",
  "save:q,k,v,attention,gate,up",
  "save:q,k,v,attention,o,gate,up",
)  # in this order each saves more
_MATERIALIZE = ("values", "gradients")
_TENSORS = (1, 2, 4, 8)
_SEQS = (1, 2, 4, 8, 16)
_SEQ_UNIT = 256  # tokens of a row that a device has at least
_EXPERTS = (1, 2, 4, 8, 16)
_STAGES = (1, 2, 4)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
_ACCUMULATE = (1, 2, 4, 8, 16)
_FINALISTS = 6
_SLACK = 1.02  # the arithmetic is wrong by a few per cent: so much above the limit is still tried


class Candidate(NamedTuple):
  """A plan by arithmetic.

  Attributes:
    c: the config with the changes.
    changes: {key: value}.
    bytes: of a device.
    merit: seconds a token and device.
  """

  c: Any
  changes: dict
  bytes: float
  merit: float


class Result(NamedTuple):
  """What compiling a candidate gave: figures of `report`, or why it does not fit or is refused."""

  candidate: Candidate
  figures: dict | None
  error: lower.OutOfMemory | UserError | None

  @property
  def fits(self):
    return self.figures is not None and self.figures["memory"]["fits"]

  @property
  def gib(self):
    """What it takes of a device, in GiB as text, or '-'."""
    if self.figures:
      return f"{self.figures['memory']['total'] / GIB:.2f}"
    return f"{needed / GIB:.2f}" if (needed := getattr(self.error, "needed", 0)) else "-"


def changed(c, changes):
  """A resolved config with other values.

  Raises:
    UserError: the values exclude each other.
  """
  c = c.copy_and_resolve_references()
  c.unlock()
  c.update_from_flattened_dict(changes)
  return lower.resolve(c.lock())


def meshes(c, topology):
  """Sizes of the mesh axes that suit a model and a topology: [{axis: size}].

  `data` goes over the slices, and over devices that fsdp cannot use; the others
  stay within a slice, and beside fsdp and data at most two of them are used.

  Args:
    c: a resolved config.
    topology: a `topology.Topology`.
  """
  m, within = c.model, topology.num_devices // topology.slices
  experts = [n for n in _EXPERTS if m.moe.experts % n == 0] if m.moe.capacity else [1]
  lengths = [n for n in _SEQS if c.data.seq_len % (_SEQ_UNIT * n) == 0 or n == 1]
  out = []
  stages = [n for n in _STAGES if m.num_layers % n == 0]
  for tensor, seq, expert, stage in itertools.product(_TENSORS, lengths, experts, stages):
    if m.num_kv_heads % tensor or m.mlp_width % tensor or m.vocab_size % tensor:
      continue
    if sum(n > 1 for n in (tensor, seq, expert, stage)) > 2:
      continue
    left = within // (tensor * seq * expert * stage)
    if left * tensor * seq * expert * stage != within:
      continue
    whole = next(n for n in range(left, 0, -1) if left % n == 0 and m.width % n == 0)
    for fsdp in sorted({whole, 1}):
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


def candidates(c, topology, keep_batch=False):
  """All `Candidate`s of a config on a topology, the best estimate first.

  Args:
    c: a resolved config.
    topology: a `topology.Topology`.
    keep_batch: whether data.batch_size stays as it is, by accumulation.
  """
  num, counts = topology.num_devices, per_device.count(c)
  out = []
  for sizes, remat in itertools.product(meshes(c, topology), REMATS):
    shards = mesh_lib.num_batch_shards(sizes)
    for rows, accumulate in itertools.product(_ROWS, _ACCUMULATE if keep_batch else (1,)):
      batch = rows * shards * accumulate
      if keep_batch and batch != c.data.batch_size:
        continue
      changes = {f"mesh.{axis}": size for axis, size in sizes.items()}
      changes |= {"model.remat": remat, "data.batch_size": batch, "optim.accumulate": accumulate}
      if c.eval.batch_size == c.data.batch_size or c.eval.batch_size % shards:
        changes["eval.batch_size"] = batch
      try:
        one = changed(c, changes)
        took = time_estimate.seconds(one, sizes, counts, topology)
      except UserError:  # such as a pattern of layers that does not suit the mesh
        continue
      out.append(
        Candidate(
          one,
          changes,
          memory_estimate.peak(memory_estimate.buffers(one, sizes, counts)),
          sum(took.values()) * num / batch / c.data.seq_len,
        )
      )
  return sorted(out, key=lambda one: one.merit)


def choose(found, limit, finalists):
  """(candidates to compile, the smallest of the better ones that should not fit, or None).

  Of each mesh and rows a device the two best by what they save, one after the other: where the
  compiler finds memory scarce it recomputes by itself, and the one that saves less is faster.

  Args:
    found: from `candidates`.
    limit: bytes of a device.
    finalists: how many to compile.
  """
  kinds = collections.defaultdict(list)
  for one in found:
    if one.bytes <= limit * _SLACK:
      kinds[tuple(v for k, v in one.changes.items() if k != "model.remat")].append(one)
  fitting = [one for same in kinds.values() for one in same[:2]]
  beyond = [
    one
    for one in found
    if one.bytes > limit * _SLACK and (not fitting or one.merit < fitting[0].merit)
  ]
  return fitting[:finalists], min(beyond, key=lambda one: one.bytes, default=None)


def search(c, topology, finalists=None, keep_batch=False, say=print, run=None):
  """Compiles the most promising plans.

  Args:
    c: a resolved config.
    topology: a `topology.Topology`.
    finalists: how many to compile; None: 6.
    keep_batch: see `candidates`.
    say: is told what goes on.
    run: compiles a candidate; default: `compiled`.

  Returns:
    `Result`s: those that fit, the best first, then the others.

  Raises:
    UserError: nothing can fit.
  """
  run = run or compiled
  found = candidates(c, topology, keep_batch)
  if not found:
    raise UserError(
      f"no mesh over {topology.num_devices} devices suits this model and "
      f"data.batch_size={c.data.batch_size}" + ("; leave --keep-batch out" if keep_batch else "")
    )
  chosen, beyond = choose(found, topology.chip.hbm_limit, finalists or _FINALISTS)
  say(
    f"{len(found)} plans, {sum(1 for o in found if o.bytes <= topology.chip.hbm_limit)} should "
    f"fit; compiling {len(chosen)}" + (" and one that should not" if beyond else "")
  )
  results = []
  for one in chosen + ([beyond] if beyond else []):
    results.append(run(one, topology))
    say(f"  {describe(one.changes)}: {verdict(results[-1])}")
  order = lambda r: (not r.fits, r.figures["merit_with_kernels"] if r.fits else r.candidate.merit)
  best = min(results, key=order)
  if best.fits:  # no arithmetic says which of these suits a generation
    for value in _MATERIALIZE:
      if value != best.candidate.c.model.materialize:
        changes = best.candidate.changes | {"model.materialize": value}
        one = best.candidate._replace(c=changed(best.candidate.c, changes), changes=changes)
        results.append(run(one, topology))
        say(f"  {describe(changes)}: {verdict(results[-1])}")
  if not any(r.fits for r in results):  # the arithmetic was too hopeful: save less until it fits
    results += _retreat(found, results, topology, say, run)
  return sorted(results, key=order)


def _retreat(found, results, topology, say, run, tries=3):
  tried = [r.candidate for r in results]
  least = min((one.bytes for one in tried), default=0)
  out = []
  for one in [o for o in found if o.bytes < 0.93 * least][:tries]:
    out.append(run(one, topology))
    say(f"  {describe(one.changes)}: {verdict(out[-1])}")
    if out[-1].fits:
      break
  return out


def remedies(c, topology):
  """Changes to a config that does not fit: for each kind the `Candidate`s that should, the least first.

  Less is saved; or the batch is cut into more microbatches; or rows are taken away.
  """
  sizes = mesh_lib.axis_sizes(c.mesh, topology.num_devices)
  counts, limit = per_device.count(c), topology.chip.hbm_limit
  rows = c.data.batch_size // mesh_lib.num_batch_shards(sizes) // c.optim.accumulate
  halves = [2**i for i in range(1, 8) if rows % 2**i == 0]
  kinds = (
    [{"model.remat": remat} for remat in reversed(REMATS)],
    [{"optim.accumulate": c.optim.accumulate * n} for n in halves],
    [{"data.batch_size": c.data.batch_size // n} for n in halves],
  )
  for ways in kinds:
    sized = []
    for changes in ways:
      with contextlib.suppress(UserError):  # a change may exclude another value of the config
        one = changed(c, changes)
        sized.append(
          Candidate(
            one, changes, memory_estimate.peak(memory_estimate.buffers(one, sizes, counts)), 0.0
          )
        )
    yield [one for one in sized if one.bytes <= limit * 0.98]


def compiled(candidate, topology):
  """The `Result` of compiling a candidate; one that is refused ends no search."""
  try:
    return Result(
      candidate, report.figures(lower.compile_step(candidate.c, topology), topology), None
    )
  except (lower.OutOfMemory, UserError) as e:
    return Result(candidate, None, e)


def describe(changes):
  """A candidate in a few words; its rows are those of a group of devices that share them."""
  sizes = {k.removeprefix("mesh."): v for k, v in changes.items() if k.startswith("mesh.")}
  axes = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
  rows = changes["data.batch_size"] // changes["optim.accumulate"]
  rows //= mesh_lib.num_batch_shards(sizes)
  again = f" x {changes['optim.accumulate']}" if changes["optim.accumulate"] > 1 else ""
  return f"{axes or 'one device'}, {rows}{again} rows, {changes['model.remat']}" + (
    f", {changes['model.materialize']} written" if "model.materialize" in changes else ""
  )


def verdict(result):
  """What compiling said, in a few words."""
  if isinstance(result.error, UserError):
    return f"refused: {result.error}"
  if result.error:
    return f"does not fit, needs {result.gib} of {result.error.limit / GIB:.2f} GiB"
  f = result.figures
  return (
    f"{f['tokens_per_second_per_chip']:,.0f} tokens/s a chip, MFU {f['mfu']:.1%}, "
    f"{result.gib} GiB" + ("" if f["memory"]["fits"] else ", does not fit")
  )


def why(result, best):
  """Why a result lost against the best: the part of a token's time that grew most."""
  if isinstance(result.error, UserError):
    return str(result.error)
  if not result.fits:
    return "too much memory"
  a, b = (r.figures for r in (best, result))
  per_token = lambda f, key: f["seconds"][key] / f["batch_size"] * 1e6
  key = max(
    ("matmul", "other", "kernels", "exposed", "unhidden", "between"),
    key=lambda k: per_token(b, k) - per_token(a, k),
  )
  word = {
    "matmul": "slower or repeated matmuls",
    "other": "more that is no matmul",
    "kernels": "attention kernels run more often",
    "exposed": "more exposed collectives",
    "unhidden": "gathers longer than the compute beside them",
    "between": "more between slices",
  }[key]
  return f"{b['merit_with_kernels'] / a['merit_with_kernels'] - 1:+.1%}: {word}"


def table(results):
  """Lines: the results, and what to paste for the best.

  Args:
    results: from `search`.
  """
  best = results[0]
  yield ""
  yield f"{'plan':<62} {'tokens/s':>9} {'MFU':>6} {'GiB':>6} {'est.':>6}  "
  for r in results:
    f = r.figures
    found = (
      f"{f['tokens_per_second_per_chip']:>9,.0f} {f['mfu']:>6.1%}" if f else f"{'-':>9} {'-':>6}"
    )
    note = "best" if r is best and r.fits else why(r, best)
    yield (
      f"{describe(r.candidate.changes):<62} {found} {r.gib:>6} "
      f"{r.candidate.bytes / GIB:>6.2f}  {note}"
    )
  yield ""
  if not best.fits:
    yield "nothing that was tried fits: take a larger slice, or shorter rows"
    return
  yield "to train with the best, add:"
  yield " ".join(f"--config.{key}={value}" for key, value in best.candidate.changes.items())
