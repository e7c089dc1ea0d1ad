"""`jaxgpt plan`: what a config takes on a topology, before it is rented."""

import itertools
import json
import pathlib

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.plan import communication_budget, cost, explain, hlo, lower, report, shardings
from jaxgpt.plan import search as search_lib
from jaxgpt.plan import topology as topology_lib
from jaxgpt.training import compiled_step


def plan(
  path, overrides, topology, *, price=None, out=None, golden=None, save_text=None, top=0, save=None
):
  """Compiles a config's train step for a topology and prints what it takes.

  Args:
    path, overrides: as `config.load` takes them.
    topology: a name for `topology.parse`.
    price: of a chip-hour, or None.
    out: file for the figures as JSON, or None.
    golden: file with a communication budget to compare with, or None; written where there is none.
    save_text: file for the compiled program's text, or None.
    top: how many of the heaviest instructions to print.
    save: file for the compiled step, which `mesh.compiled_step` names, or None.

  Returns:
    An exit code: 0, or 1 where the program does not fit or exceeds its budget.

  Raises:
    UserError: see `config.load`, `topology.parse` and `lower.compile_step`; or a program for GPUs
      is to be saved where there are none.
  """
  c = lower.resolve(config.load(path, overrides)[0])
  where = topology_lib.parse(topology)
  if save and where.chip.gpu:
    raise UserError(
      f"--save={save}: XLA tunes the matmuls of a GPU's program by measuring them, so "
      "one that was compiled without a GPU would be slow; save it on the GPUs with "
      f"--topology={topology_lib.HERE}"
    )
  if top and where.chip.gpu:
    raise UserError(
      f"--top={top} reads the cycles in a TPU's program; a GPU's has none: leave it out"
    )
  print(f"compiling for {where.num_chips} x {where.chip.name} …", flush=True)
  try:
    compiled = lower.compile_step(c, where, use_cache=not save)
  except lower.OutOfMemory as e:
    _explain(e, c, where)
    return 1
  text = compiled.executable.as_text()
  if save_text:
    _write(save_text, text)
  if save:
    _save(save, compiled)
  found = report.figures(compiled, where, price)
  print("\n".join(report.table(found)), flush=True)
  if top:
    lines = cost.heaviest(hlo.parse(text), top)
    print("\n".join(report.heaviest_lines(lines, where.chip)), flush=True)
  if out:
    _write(out, json.dumps(found, indent=2))
  differs = communication_budget.check(golden, found) if golden else 0
  memory = found["memory"]
  if not memory["fits"]:  # compilers of GPUs' programs don't refuse it
    print(flush=True)
    _explain(lower.OutOfMemory(memory["total"], memory["limit"]), c, where)
    return 1
  return differs


def draw(path, overrides, topology):
  """Prints how a config's arrays are cut over the mesh it asks for; compiles nothing.

  Args:
    path, overrides, topology: as in `plan`; no compiler is needed.

  Raises:
    UserError: as `plan`, or `mesh.axis_sizes`.
  """
  c = lower.resolve(config.load(path, overrides)[0])
  sizes = mesh_lib.axis_sizes(c.mesh, topology_lib.parse(topology).num_devices)
  mesh_lib.check_batch(sizes, c.data.batch_size, c.optim.accumulate)
  print("\n".join(shardings.describe(c, sizes)))
  return 0


def here(path, overrides, *, save_text=None, save=None):
  """Compiles a config's train step for the devices of this machine and prints what memory it takes.

  Args:
    path, overrides, save_text, save: as in `plan`.

  Raises:
    UserError: as `plan`.
  """
  c = lower.resolve(config.load(path, overrides)[0])
  compiled = lower.compile_step(c, topology_lib.parse(topology_lib.HERE), use_cache=not save)
  print("\n".join(report.of_this_machine(compiled)), flush=True)
  if save_text:
    _write(save_text, compiled.executable.as_text())
  if save:
    _save(save, compiled)
  return 0


def _explain(error, c, where):
  for line in itertools.chain(explain.out_of_memory(error, c, where), explain.remedies(c, where)):
    print(line, flush=True)


def _save(path, compiled):
  made_from = compiled_step.identity(
    compiled.lowered, compiled.mesh, compiled.c.mesh.compiler_options
  )
  size = compiled_step.save(path, compiled.executable, made_from)
  print(
    f"wrote {path}, {size / 1e6:.1f} MB; train with --config.mesh.compiled_step={path}", flush=True
  )


def search(path, overrides, topology, *, finalists=None, keep_batch=False, out=None):
  """Looks for the fastest plan that fits, and prints those that were compiled.

  Args:
    path, overrides, topology, out: as in `plan`.
    finalists: how many plans to compile; None: 6.
    keep_batch: whether data.batch_size stays.

  Returns:
    An exit code: 1 where nothing fits.

  Raises:
    UserError: as `plan`.
  """
  c = lower.resolve(config.load(path, overrides)[0])
  where = topology_lib.parse(topology)
  topology_lib.devices(where)  # that there is a compiler is asked once, not for each plan
  results = search_lib.search(
    c, where, finalists, keep_batch, say=lambda line: print(line, flush=True)
  )
  print("\n".join(search_lib.table(results)), flush=True)
  if out:
    _write(
      out,
      json.dumps(
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


def _write(path, text):
  try:
    pathlib.Path(path).write_text(text, encoding="utf-8")
  except OSError as e:
    raise UserError(f"{path} cannot be written: {e.strerror}") from e
