"""`jaxgpt plan`: what a config takes on a topology, before it is rented."""

import json
import pathlib

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.plan import explain, lower, report
from jaxgpt.plan import golden as golden_lib
from jaxgpt.plan import topology as topology_lib


def plan(path, overrides, topology, *, price=None, out=None, golden=None, save_text=None):
  """Compiles a config's train step for a topology and prints what it takes.

  Args:
    path, overrides: as `config.load` takes them.
    topology: a name for `topology.parse`.
    price: of a chip-hour, or None.
    out: file for the figures as JSON, or None.
    golden: file with a communication budget to compare with, or None; written where there is none.
    save_text: file for the compiled program's text, or None.

  Returns:
    An exit code: 0, or 1 where the program does not fit or exceeds its budget.

  Raises:
    UserError: see `config.load`, `topology.parse` and `lower.compile_step`.
  """
  c = lower.resolve(config.load(path, overrides)[0])
  where = topology_lib.parse(topology)
  print(f"compiling for {where.num_chips} {where.chip.name} chips …", flush=True)
  try:
    compiled = lower.compile_step(c, where)
  except lower.OutOfMemory as e:
    print("\n".join(explain.out_of_memory(e, c, where)))
    return 1
  if save_text:
    _write(save_text, compiled.executable.as_text())
  found = report.figures(compiled, where, price)
  print("\n".join(report.table(found)), flush=True)
  if out:
    _write(out, json.dumps(found, indent=2))
  if golden:
    return golden_lib.check(golden, found)
  return 0 if found["memory"]["fits"] else 1


def _write(path, text):
  try:
    pathlib.Path(path).write_text(text, encoding="utf-8")
  except OSError as e:
    raise UserError(f"{path} cannot be written: {e.strerror}") from e
