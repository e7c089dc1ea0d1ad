"""Seconds of a step by arithmetic against those of the compiled schedule, kernels included.

  python tests/benchmarks/plan_time.py [NAME...]      (needs jaxgpt[tpu], no TPU)

Compiles each case below, and each recipe of `published_recipes.py`, that
`tests/plan/time_estimate.json` lacks for this case, libtpu and JAX, adds it to the file with the
date, and prints the table. Given names are compiled again; several processes may compile different
ones. An entry is that of jaxgpt at its date. A case takes 5 to 40 minutes on one core: libtpu
optimizes a program in seconds, and takes the rest to generate the code of each fusion, longer the
wider the chip's MXU is. `tests/plan/time_estimate_test.py` compares the arithmetic with the file.
"""

import datetime
import gc
import importlib.metadata
import json
import pathlib
import sys

from jaxgpt.plan import environment

environment.prepare()

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh
from jaxgpt.plan import lower, per_device, report, time_estimate, topology

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.benchmarks.plan_memory import QKVA, SAVE, SAVE_O, case
from tests.benchmarks.published_recipes import RECIPES, setting

FILE = ROOT / "tests" / "plan" / "time_estimate.json"

CASES = {
  name: (path, where, overrides)
  for name, path, where, overrides in (
    case("llama2_7b", "v5e-256", 512, 2048, SAVE),
    case("llama2_7b", "v5e-256", 512, 2048, SAVE_O),
    case("llama2_7b", "v5e-256", 512, 2048, "full"),
    case("llama2_7b", "v5e-256", 768, 2048, "save:attention,gate,up+offload:q,k,v"),
    case("llama2_7b", "v5e-256", 1024, 2048, "save:q,k,v"),
    case("llama2_7b", "v5p-128", 384, 4096, SAVE_O),
    case("llama2_7b", "v5p-128", 256, 4096, "save:q,k,v,o,gate,up,down"),
    case("llama2_70b,tensor", "v5p-128", 64, 4096, SAVE_O, mesh__fsdp=32, mesh__tensor=2),
    case(
      "llama2_70b,tensor",
      "v5p-128",
      96,
      4096,
      "save:o,gate,up+offload:q,k,v,attention",
      mesh__fsdp=32,
      mesh__tensor=2,
      mesh__compiler_options=("xla_tpu_enable_all_experimental_scheduler_features=true",),
    ),
    case("llama2_70b", "v5p-128", 64, 4096, SAVE),
    case("llama3_8b", "v5e-256", 256, 8192, QKVA),
    case("llama3_8b", "v5e-256", 256, 8192, "save:attention,o+offload:q,k,v"),
    case("llama3_8b", "v5e-256", 256, 8192, "save:q,k,v,attention+offload:o,up"),
    *(
      case("llama3_8b", "v5e-256", rows, 8192, remat, objective__loss_chunk=2048)
      for rows, remat in (
        (256, "save:attention,up+offload:q,k,v"),
        (512, "save:attention+offload:q,k,v"),
      )
    ),
    case("llama3_8b,tensor", "v5e-256", 128, 8192, SAVE_O, mesh__fsdp=128, mesh__tensor=2),
    case(
      "llama31_8b,seq tensor",
      "v5e-256",
      64,
      32768,
      QKVA,
      mesh__fsdp=64,
      mesh__seq=2,
      mesh__tensor=2,
    ),
    case("llama3_8b", "v6e-64", 192, 8192, "save:attention"),
    case("llama31_8b,seq", "v6e-64", 32, 32768, QKVA, mesh__fsdp=32, mesh__seq=2),
    case("llama32_1b", "v5e-16", 16, 4096, "full"),
    case("llama32_1b", "v5e-16", 32, 4096, QKVA),
    case("qwen3_0_6b", "v5e-16", 32, 4096, QKVA),
    case("llama32_3b", "v5p-32", 64, 8192, QKVA),
    case("qwen3_8b", "v5p-64", 64, 8192, SAVE),
    case(
      "mixtral_8x7b,expert",
      "v5p-128",
      192,
      4096,
      SAVE_O,
      mesh__fsdp=8,
      mesh__expert=8,
      model__moe__capacity=1.25,
    ),
  )
} | {name: setting(recipe) for name, recipe in RECIPES.items()}


def plan(name):
  """(resolved config, topology) of a case."""
  path, where, overrides = CASES[name]
  return lower.resolve(config.load(f"{ROOT}/{path}", overrides)[0]), topology.parse(where)


def known():
  """The entries of the file by name."""
  return json.loads(FILE.read_text()) if FILE.exists() else {}


def measured(name, again=False):
  """The entry of a case, from the file or compiled now.

  Raises:
    OutOfMemory, UserError: See `lower.compile_step`.
  """
  wanted = dict(zip(("config", "topology", "overrides"), CASES[name], strict=True))
  wanted |= {package: importlib.metadata.version(package) for package in ("libtpu", "jax")}
  old = known().get(name, {})
  if not again and {key: old.get(key) for key in wanted} == wanted:
    return old
  c, where = plan(name)
  step = lower.compile_step(c, where)
  f = report.figures(step, where)
  seconds = {kind: round(s, 5) for kind, s in f["seconds"].items() if kind != "step"}
  entry = wanted | {
    "seconds": seconds,
    "memory": f["memory"]["total"],
    "compiled_in": round(step.seconds),
    "date": datetime.date.today().isoformat(),
  }
  entries = known() | {name: entry}  # read again: another process may have added to it
  order = {n: i for i, n in enumerate(CASES)}
  ordered = dict(sorted(entries.items(), key=lambda pair: order.get(pair[0], len(order))))
  FILE.write_text(json.dumps(ordered, indent=1) + "\n")
  return entry


def main(names):
  for name in names or CASES:
    try:
      entry = measured(name, again=bool(names))
    except (lower.OutOfMemory, UserError) as e:
      print(f"{name}: {e}", flush=True)
      continue
    c, where = plan(name)
    sizes = mesh.axis_sizes(c.mesh, where.num_devices)
    arithmetic = time_estimate.seconds(c, sizes, per_device.count(c), where)
    total, step = sum(arithmetic.values()), sum(entry["seconds"].values())
    print(
      f"{name}: {step:.3f} s compiled, {total:.3f} by arithmetic, {total / step - 1:+.1%}; "
      + ", ".join(f"{k} {s:.3f} ({arithmetic.get(k, 0):.3f})" for k, s in entry["seconds"].items())
      + f"; {entry['memory'] / 2**30:.1f} GiB, compiled in {entry['compiled_in']} s",
      flush=True,
    )
    gc.collect()


if __name__ == "__main__":
  main(sys.argv[1:])
