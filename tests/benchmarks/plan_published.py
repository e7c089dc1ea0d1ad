"""Estimated against measured step times: recipes that others have run on real pods.

  python tests/benchmarks/plan_published.py [--arithmetic | --maxtext] [NAME...]

Needs libtpu, but no TPU. Compiles the equivalent of each recipe in jaxgpt, with its rows and its
saved activations, and compares the estimated step with the time that the recipe's page reports. A
program takes minutes. `--maxtext` compiles the recipe itself (see `plan_maxtext.py`).
`--arithmetic` compiles nothing and compares the seconds by which a search ranks plans.
The measurements are lines of MaxText's log in the README files of AI-Hypercomputer/tpu-recipes
(training/trillium), with JAX 0.5.2 and 0.6.1, so older compilers than the one of the estimate.
"""

import pathlib
import sys
import tempfile
from typing import NamedTuple

from jaxgpt.plan import environment

environment.prepare()

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.parallel import chips, mesh
from jaxgpt.plan import lower, memory_estimate, per_device, report, time_estimate, topology

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.benchmarks import plan_maxtext


class Recipe(NamedTuple):
  """A published result.

  Attributes:
    preset: Our preset of the model.
    where: Topology.
    rows: Rows of a chip.
    length: Tokens of a row.
    seconds: Measured seconds of a step.
    source: Folder in tpu-recipes/training/trillium.
    changes: {config key: value} of the equivalent.
  """

  preset: str
  where: str
  rows: int
  length: int
  seconds: float
  source: str
  changes: dict


# What the recipes move to the host's memory.
_OFFLOADED = {"model.remat": "offload:input,q,k,v,o"}
_QKV_OFFLOADED = {"model.remat": "offload:input,q,k,v", "objective.loss_chunk": 2048}
# Where the logits of all rows would not fit, as in the one above.
_CHUNKED = _OFFLOADED | {"objective.loss_chunk": 2048}

RECIPES = {
  "8b_256": Recipe(
    "llama31_8b", "v6e-256", 4, 8192, 4.546, "Llama3.1-8B-MaxText/v6e-256", _OFFLOADED
  ),
  "8b_128": Recipe(
    "llama31_8b", "v6e-128", 4, 8192, 4.602, "Llama3.1-8B-MaxText/v6e-128", _OFFLOADED
  ),
  "8b_32": Recipe("llama31_8b", "v6e-32", 3, 8192, 3.495, "Llama3.1-8B-MaxText/v6e-32", _OFFLOADED),
  "8b_8": Recipe("llama31_8b", "v6e-8", 3, 8192, 3.443, "Llama3.1-8B-MaxText/v6e-8", _CHUNKED),
  "mistral": Recipe(
    "mistral_7b_v03",
    "v6e-8",
    6,
    8192,
    6.320,
    "Mistral-7B-MaxText",
    _CHUNKED | {"model.vocab_size": 32000},
  ),
  "70b_256": Recipe(
    "llama31_70b", "v6e-256", 5, 8192, 42.656, "Llama3.1-70B-MaxText/v6e-256", _QKV_OFFLOADED
  ),
  "70b_64": Recipe(
    "llama31_70b", "v6e-64", 2, 8192, 18.688, "Llama3.1-70B-MaxText/v6e-64", _QKV_OFFLOADED
  ),
  # The recipe's page says 3 rows of a chip, its log has the tokens of 2.
  "llama2_70b": Recipe(
    "llama2_70b", "v6e-256", 2, 4096, 9.052, "Llama2-70B-MaxText", _QKV_OFFLOADED
  ),
  "mixtral": Recipe(
    "mixtral_8x7b",
    "v6e-256",
    12,
    4096,
    13.484,
    "Mixtral-8x7B-MaxText",
    _OFFLOADED | {"model.moe.capacity": 1.25},
  ),
  "8x22b": Recipe(
    "mixtral_8x22b",
    "v6e-256",
    8,
    4096,
    24.706,
    "Mixtral-8x22B-MaxText",
    _OFFLOADED | {"model.moe.capacity": 1.25, "mesh.expert": 4},
  ),
}


# MaxText's names of the models and of the activations, and what all of the recipes set. Of their
# flags for libtpu these are the ones for memory, host transfers and collectives within a slice.
MODELS = {
  "llama31_8b": "llama3.1-8b",
  "llama31_70b": "llama3.1-70b",
  "llama2_70b": "llama2-70b",
  "mistral_7b_v03": "mistral-7b",
  "mixtral_8x7b": "mixtral-8x7b",
  "mixtral_8x22b": "mixtral-8x22b",
}
ACTIVATIONS = {
  "input": "decoder_layer_input",
  "q": "query_proj",
  "k": "key_proj",
  "v": "value_proj",
  "o": "out_proj",
}
COMMON = ("remat_policy=custom", *plan_maxtext.BLOCKS_2048)
FLAGS = (
  *plan_maxtext.V6E,
  "--xla_tpu_scoped_vmem_limit_kib=98304",
  "--xla_tpu_enable_all_experimental_scheduler_features=true",
  "--xla_tpu_enable_scheduler_memory_pressure_tracking=true",
  "--xla_tpu_host_transfer_overlap_limit=24",
  "--xla_tpu_aggressive_opt_barrier_removal=ENABLED",
  "--xla_lhs_prioritize_async_depth_over_stall=ENABLED",
  "--xla_should_allow_loop_variant_parameter_in_chain=ENABLED",
  "--xla_should_add_loop_invariant_op_in_chain=ENABLED",
  "--xla_max_concurrent_host_send_recv=100",
  "--xla_tpu_scheduler_percent_shared_memory_limit=100",
  "--xla_latency_hiding_scheduler_rerun=2",
)


def by_maxtext(recipe):
  """Compiles the recipe: ({kind: seconds}, None, since its memory is not known)."""
  where = topology.parse(recipe.where)
  offloaded = recipe.changes["model.remat"].removeprefix("offload:").split(",")
  arguments = [*COMMON, *(f"{ACTIVATIONS[name]}=offload" for name in offloaded)]
  if "model.moe.capacity" in recipe.changes:
    arguments += plan_maxtext.CAPACITY
  if "objective.loss_chunk" in recipe.changes:  # else its logits do not fit either
    arguments.append("num_vocab_tiling=8")
  if "mesh.expert" in recipe.changes:
    arguments.append(f"ici_expert_parallelism={recipe.changes['mesh.expert']}")
  with tempfile.TemporaryDirectory() as folder:
    found = plan_maxtext.run_maxtext(
      where, MODELS[recipe.preset], recipe.rows, recipe.length, arguments, FLAGS, folder
    )
  of_step = recipe.rows * recipe.length / 1e6
  kernels = (found.whole - found.plain) * of_step
  return {"without kernels": found.plain * of_step, "kernels": kernels}, None


def resolved(recipe, where):
  """The config of the equivalent of a recipe."""
  changes = {
    "data.seq_len": recipe.length,
    "data.batch_size": recipe.rows * where.num_devices,
    **recipe.changes,
  }
  loaded, _ = config.load(
    f"{ROOT}/configs/llama3_8b.py:{recipe.preset}",
    [f"--config.{key}={value}" for key, value in changes.items()],
  )
  return lower.resolve(loaded)


def by_schedule(recipe):
  """Compiles the equivalent of a recipe: ({kind: seconds}, GiB)."""
  where = topology.parse(recipe.where)
  f = report.figures(lower.compile_step(resolved(recipe, where), where), where)
  return {k: s for k, s in f["seconds"].items() if k != "step"}, f["memory"]["total"] / chips.GIB


def by_arithmetic(recipe):
  """The same without compiling."""
  where = topology.parse(recipe.where)
  c = resolved(recipe, where)
  sizes, counts = mesh.axis_sizes(c.mesh, where.num_devices), per_device.count(c)
  memory = memory_estimate.peak(memory_estimate.buffers(c, sizes, counts, where.chip))
  return time_estimate.seconds(c, sizes, counts, where), memory / chips.GIB


def main(arguments):
  names = [a for a in arguments if not a.startswith("--")] or RECIPES
  estimates = {"--arithmetic": by_arithmetic, "--maxtext": by_maxtext}
  (estimate,) = [f for name, f in estimates.items() if name in arguments] or [by_schedule]
  errors = []
  for name in names:
    recipe = RECIPES[name]
    try:
      seconds, memory = estimate(recipe)
    except (lower.OutOfMemory, UserError) as e:
      print(f"{name}: {e}", flush=True)
      continue
    step = sum(seconds.values())
    error = step / recipe.seconds - 1
    errors.append(abs(error))
    parts = ", ".join(f"{kind} {value:.3f}" for kind, value in seconds.items())
    size = "" if memory is None else f"{memory:.1f} GiB; "
    print(
      f"{name}: {step:.3f} s estimated, {recipe.seconds:.3f} measured: {error:+.1%} "
      f"({recipe.source}; {size}{parts})",
      flush=True,
    )
  if errors:
    print(f"mean absolute error of {len(errors)}: {sum(errors) / len(errors):.1%}")


if __name__ == "__main__":
  main(sys.argv[1:])
