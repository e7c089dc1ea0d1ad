"""Plans of a config on a topology: compile, draw the shardings, or search for the fastest."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Sequence

import ml_collections
from etils import epath

from jaxgpt import config
from jaxgpt.commands.actions import progress
from jaxgpt.errors import UserError
from jaxgpt.hf.weight_source import WEIGHT_SOURCES
from jaxgpt.parallel import chips
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.plan import communication_budget, cost, explain, hlo, lower, report, shardings
from jaxgpt.plan import topology as topology_lib
from jaxgpt.plan.search import search as search_lib
from jaxgpt.run import teacher
from jaxgpt.storage import buckets, strict_json
from jaxgpt.training import build, compiled_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
  """Files that a plan writes in addition to what it prints. None leaves a file out.

  Attributes:
    figures: The printed figures, as JSON.
    golden: A communication budget to compare with.
    new_golden: A file to write the communication budget to.
    program: The text of the compiled program.
    step: The compiled step, for `mesh.compiled_step`.
  """

  figures: epath.PathLike | None = None
  golden: epath.PathLike | None = None
  new_golden: epath.PathLike | None = None
  program: epath.PathLike | None = None
  step: epath.PathLike | None = None

  def check(self) -> None:
    """Checks the files before minutes are spent on compiling.

    Raises:
      UserError: A file cannot be written, the budget to compare with does not exist, or it is the
        one to write.
    """
    if self.golden:
      same = self.new_golden and (
        pathlib.Path(self.golden).resolve() == pathlib.Path(self.new_golden).resolve()
      )
      if same:
        raise UserError(
          f"--golden and --write-golden name the same file, {self.golden}, so the budget would be "
          "compared with itself; leave one of them out"
        )
      communication_budget.check_exists(self.golden)
    for path in (self.figures, self.new_golden, self.program, self.step):
      if path:
        _check_writable(path)


def plan(
  path: epath.PathLike,
  overrides: Sequence[str],
  topology: str,
  outputs: Outputs = Outputs(),
  *,
  price: float | None = None,
  top: int = 0,
) -> int:
  """Compiles a config's train step for a topology and prints its memory, time and communication.

  Args:
    path, overrides: As in `config.load`.
    topology: A name for `topology.parse`.
    outputs: Files to write.
    price: Price of a chip-hour.
    top: Number of the most expensive instructions to print.

  Returns:
    The exit code: 0, or 1 if the program does not fit or exceeds its budget.

  Raises:
    UserError: See `Outputs.check`, `config.load`, `topology.parse`, `lower.compile_step` and
      `lower.text`. Also if a step for GPUs is to be saved on a machine without them.
  """
  outputs.check()
  c = _load(path, overrides)
  where = topology_lib.parse(topology)
  chip = where.chip
  assert chip is not None, "`here` plans for this machine"
  _check_chip(chip, outputs.step, top)
  print(f"compiling for {where.num_chips} x {chip.name} …", flush=True)
  try:
    compiled = lower.compile_step(c, where, use_cache=not outputs.step)
  except lower.OutOfMemory as e:
    _explain(e, c, where)
    return 1
  text = lower.text(compiled)
  found = report.figures(compiled, where, price)
  print("\n".join(report.table(found)), flush=True)
  if top:
    lines = cost.heaviest(hlo.parse(text), top)
    print("\n".join(report.heaviest_lines(lines, chip)), flush=True)
  if outputs.step:
    _save(outputs.step, compiled)
  if outputs.program:
    _write(outputs.program, text)
  if outputs.figures:
    _write(outputs.figures, strict_json.dumps(found, indent=2))
  if outputs.new_golden:
    communication_budget.write(outputs.new_golden, found)
  differs = communication_budget.check(outputs.golden, found) if outputs.golden else 0
  memory = found["memory"]
  if not memory["fits"]:  # the compiler for GPUs does not refuse it
    print(flush=True)
    _explain(lower.OutOfMemory(memory["total"], memory["limit"]), c, where)
    return 1
  return differs


def _load(path: epath.PathLike, overrides: Sequence[str]) -> ml_collections.ConfigDict:
  """The resolved config, as a new run of it would have it."""
  loaded, origin = config.load(path, overrides)
  c = teacher.settle(lower.resolve(loaded), WEIGHT_SOURCES).c
  build.check_settings(loaded, origin)
  return c


def _check_chip(chip: chips.Chip, save: epath.PathLike | None, top: int) -> None:
  """Refuses options that make no sense for a GPU that is not there."""
  if save and chip.gpu:
    raise UserError(
      f"--save={save}: XLA tunes matmuls for a GPU by measuring them, so a step compiled without "
      f"the GPU would be slow; save it on the GPUs with --topology={topology_lib.HERE}"
    )
  if top and chip.gpu:
    raise UserError(
      f"--top={top} needs the cycle counts of a program for TPUs; for GPUs, leave it out"
    )


def draw(path: epath.PathLike, overrides: Sequence[str], topology: str) -> int:
  """Prints the sharding of a config's arrays over its mesh. Compiles nothing.

  Args:
    path, overrides, topology: As in `plan`.

  Raises:
    UserError: As in `plan`, `mesh.axis_sizes` and `shardings.describe`.
  """
  c = _load(path, overrides)
  parsed = topology_lib.parse(topology)
  sizes = mesh_lib.axis_sizes(c.mesh, parsed.num_devices)
  print("\n".join(shardings.describe(c, sizes, parsed.platform)))
  return 0


def here(
  path: epath.PathLike,
  overrides: Sequence[str],
  outputs: Outputs = Outputs(),
) -> int:
  """Compiles a config's train step for the devices of this machine and prints its memory.

  Args:
    path, overrides: As in `plan`.
    outputs: Files to write: `program` and `step`.

  Raises:
    UserError: As in `plan`.
  """
  outputs.check()
  c = _load(path, overrides)
  compiled = lower.compile_step(
    c, topology_lib.parse(topology_lib.HERE), use_cache=not outputs.step
  )
  print("\n".join(report.of_this_machine(compiled)), flush=True)
  if outputs.step:
    _save(outputs.step, compiled)
  if outputs.program:
    _write(outputs.program, lower.text(compiled))
  return 0


def _explain(
  error: lower.OutOfMemory, c: ml_collections.ConfigDict, where: topology_lib.Topology
) -> None:
  for line in itertools.chain(explain.out_of_memory(error, c, where), explain.remedies(c, where)):
    print(line, flush=True)


def _save(path: epath.PathLike, compiled: lower.Compiled) -> None:
  made_from = compiled_step.identity(
    compiled.lowered, compiled.mesh, compiled.c.mesh.compiler_options
  )
  size = compiled_step.save(path, compiled.executable, made_from)
  print(
    f"wrote {path}, {size / 1e6:.1f} MB; train with --config.mesh.compiled_step={path}", flush=True
  )


def search(
  path: epath.PathLike,
  overrides: Sequence[str],
  topology: str,
  *,
  finalists: int | None = None,
  keep_batch: bool = False,
  offload: bool = False,
  out: epath.PathLike | None = None,
) -> int:
  """Searches for the fastest plan that fits and prints the plans that it compiled.

  Args:
    path, overrides, topology: As in `plan`.
    finalists: Number of plans to compile. None: 6.
    keep_batch: Keep data.batch_size.
    offload: Try to move saved activations to the host.
    out: File to write the figures of all plans to, as JSON.

  Returns:
    The exit code: 0, or 1 if nothing fits.

  Raises:
    UserError: As in `plan`.
  """
  Outputs(figures=out).check()
  c = _load(path, overrides)
  where = topology_lib.parse(topology)
  topology_lib.devices(where)  # raises once, not for each plan, if there is no compiler
  with progress.Live("programs") as live:
    results = search_lib.search(
      c,
      where,
      finalists,
      keep_batch,
      offload,
      say=lambda line: print(line, flush=True),
      show=lambda done, total, name: live.count(done, total, "compile", detail=name),
    )
  print("\n".join(search_lib.table(results)), flush=True)
  if out:
    _write(
      out,
      strict_json.dumps(
        [
          {
            "changes": r.candidate.changes,
            "estimated_bytes": r.candidate.bytes,
            "figures": r.figures,
            "needed_bytes": getattr(r.error, "needed", None),
            "refused": str(r.error) if isinstance(r.error, UserError) else None,
          }
          for r in results
        ],
        indent=2,
      ),
    )
  return 0 if results[0].fits else 1


def _check_writable(path: epath.PathLike) -> None:
  file = epath.Path(path)
  if buckets.is_remote(file):
    return
  if not file.parent.is_dir():
    reason = f"there is no folder {file.parent}"
  elif file.is_dir():
    reason = "it is a folder"
  elif not os.access(file if file.exists() else file.parent, os.W_OK):
    reason = "no permission"
  else:
    return
  raise UserError(f"{path} cannot be written ({reason}); name another file")


def _write(path: epath.PathLike, text: str) -> None:
  try:
    pathlib.Path(path).write_text(text, encoding="utf-8")
  except OSError as e:
    raise UserError(f"{path} cannot be written ({e.strerror}); name another file") from e
