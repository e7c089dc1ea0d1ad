"""Estimated against measured step times: recipes that others have run on real pods.

  python tests/benchmarks/plan_published.py [--arithmetic | --maxtext] [NAME...]

Needs libtpu, but no TPU. Compares the estimated step of the equivalent of each recipe in jaxgpt,
with its rows and its saved activations, with the time that the recipe's page reports. The estimates
are those that `plan_time.py` recorded. Where it has none the equivalent is compiled and recorded,
which takes minutes. Waits for the host's memory are printed, and left out of the comparison.
`--maxtext` compiles the recipes of tpu-recipes themselves (see `plan_maxtext.py`). `--arithmetic`
compiles nothing and compares the seconds by which a search ranks plans. The recipes and their
sources are in `published_recipes.py`.
"""

import pathlib
import sys
import tempfile

from jaxgpt.plan import environment

environment.prepare()

from jaxgpt.errors import UserError
from jaxgpt.parallel import chips, mesh
from jaxgpt.plan import lower, memory_estimate, per_device, time_estimate, topology

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.benchmarks import plan_maxtext, plan_time
from tests.benchmarks.published_recipes import RECIPES

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


def by_maxtext(name):
  """Compiles the recipe: ({kind: seconds}, None, since its memory is not known)."""
  recipe = RECIPES[name]
  if recipe.preset not in MODELS:
    raise UserError("--maxtext knows the recipes of tpu-recipes only")
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


def by_schedule(name):
  """The schedule of the equivalent, recorded or compiled now: ({kind: seconds}, GiB)."""
  entry = plan_time.measured(name)
  return entry["seconds"], entry["memory"] / chips.GIB


def by_arithmetic(name):
  """The same without compiling."""
  c, where = plan_time.plan(name)
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
      seconds, memory = estimate(name)
    except (lower.OutOfMemory, UserError) as e:
      print(f"{name}: {e}", flush=True)
      continue
    host = seconds.get("host", 0.0)
    step = sum(seconds.values()) - host
    error = step / recipe.seconds - 1
    errors.append(abs(error))
    parts = ", ".join(f"{kind} {value:.3f}" for kind, value in seconds.items())
    size = "" if memory is None else f"{memory:.1f} GiB; "
    waits = f", with {host:.3f} s of waits for the host {(step + host) / recipe.seconds - 1:+.1%}"
    print(
      f"{name}: {step:.3f} s estimated, {recipe.seconds:.3f} measured: {error:+.1%}"
      f"{waits * bool(host)} ({recipe.source}; {size}{parts})",
      flush=True,
    )
  if errors:
    print(f"mean absolute error of {len(errors)}: {sum(errors) / len(errors):.1%}")


if __name__ == "__main__":
  main(sys.argv[1:])
