"""Chip-microseconds per token, by the TPU compiler's schedule: our plans and MaxText's recipes.

  python tests/benchmarks/plan_maxtext.py [WORKLOAD...]

Needs libtpu, but no TPU. MaxText's tuned recipes are compiled by the same compiler if `pip
install 'maxtext[tpu]==0.2.5'` (Python 3.12) is in the same environment; else its column is empty.
A program takes 2 to 40 minutes of a core. A figure is (cycles / clock + exposed bytes /
interconnect) divided by the tokens of a chip, without attention kernels and with them. Their time
comes from the schedules that libtpu writes, on both sides. Waits for the host are not counted.
`--only=maxtext`, `--only=same` and `--only=best` compile one program of a workload. `--keep=DIR`
keeps MaxText's program and schedules.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from jaxgpt import config
from jaxgpt.model.attention.masks import Band
from jaxgpt.parallel import chips
from jaxgpt.plan import cost, hlo, lower, topology
from jaxgpt.plan.schedule import dump, kernels

# Flags of the recipes, except on v5e without those that libtpu refuses ("continuation fusion").
_COMMON = (
  "xla_tpu_enable_data_parallel_all_reduce_opt",
  "xla_tpu_data_parallel_opt_different_sized_ops",
  "xla_tpu_overlap_compute_collective_tc",
  "xla_enable_async_all_gather",
)
_FUSION = "xla_tpu_enable_async_collective_fusion"
_V5E = [
  f"--{name}=true"
  for name in (*_COMMON, _FUSION, f"{_FUSION}_fuse_all_gather", f"{_FUSION}_multiple_steps")
]
_V5P = [
  f"--{name}=true"
  for name in (
    *_COMMON,
    "xla_enable_async_collective_permute",
    "xla_tpu_enable_ag_backward_pipelining",
  )
]
_V5P.append("--xla_tpu_megacore_fusion_allow_ags=false")
V6E = [f"--{name}=true" for name in (*_COMMON, "xla_tpu_enable_ag_backward_pipelining")]
_V5P_EXPERTS = [*_V5P, "--xla_tpu_scoped_vmem_limit_kib=81920"]
_V6E_EXPERTS = [*V6E, "--xla_tpu_scoped_vmem_limit_kib=81920"]


class Plan(NamedTuple):
  """A plan of ours.

  Attributes:
    rows: Of a shard of the batch.
    remat: `model.remat`.
    tensor: `mesh.tensor`.
    expert: `mesh.expert`.
  """

  rows: int
  remat: str
  tensor: int = 1
  expert: int = 1

  def __str__(self):
    axes = "".join(f", {name} {n}" for name, n in zip(("tensor", "expert"), self[2:]) if n > 1)
    return f"{self.rows} rows, {self.remat}{axes}"


class Workload(NamedTuple):
  """A model on a topology.

  Attributes:
    preset: ours.
    where: topology.
    length: tokens a row.
    theirs: (rows a chip, remat policy) of MaxText's recipe.
    same: the value of model.remat that saves the same.
    ours: a plan that the arithmetic of `plan --search --offload` ranks high.
    flags: libtpu's, of the recipe.
    arguments: further arguments of the recipe, 'name=value'.
    changes: (config key, value) of ours in addition.
    name: MaxText's of the model, if it is not the preset's.
  """

  preset: str
  where: str
  length: int
  theirs: tuple
  same: str
  ours: Plan
  flags: list[str]
  arguments: tuple[str, ...] = ()
  changes: tuple[tuple[str, object], ...] = ()
  name: str = ""


# A recipe's experts have 1.25 times the slots that equal loads need, and matmuls over the slots.
CAPACITY = ("megablox=false", "sparse_matmul=false", "capacity_factor=1.25")
BLOCKS_2048 = (
  *(f"sa_block_{name}=2048" for name in ("q", "kv", "kv_compute")),
  *(f"sa_block_{name}=2048" for name in ("q_dkv", "kv_dkv", "kv_dkv_compute")),
  "sa_use_fused_bwd_kernel=true",
)

WORKLOADS = {
  "v5e_7b": Workload(
    "llama2_7b",
    "v5e-256",
    2048,
    (4, "save_qkv_proj"),
    "save:q,k,v",
    Plan(3, "save:attention,gate,up+offload:q,k,v"),
    _V5E,
  ),
  "v5e_7b_full": Workload(
    "llama2_7b",
    "v5e-256",
    2048,
    (2, "full"),
    "full",
    Plan(3, "save:attention,gate,up+offload:q,k,v"),
    _V5E,
  ),
  "v5p_7b": Workload(
    "llama2_7b",
    "v5p-128",
    4096,
    (4, "minimal"),
    "save:q,k,v,o,gate,up,down",
    Plan(6, "save:q,k,v,attention,o,gate,up"),
    _V5P,
  ),
  "v5p_70b": Workload(
    "llama2_70b",
    "v5p-128",
    4096,
    (2, "save_dot_except_mlpwi"),
    "save:q,k,v,o,down",
    Plan(2, "save:q,k,v,attention,o,gate,up", tensor=2),
    _V5P,
  ),
  "v6e_mixtral": Workload(
    "mixtral_8x7b",
    "v6e-256",
    4096,
    (4, "full"),
    "full",
    Plan(4, "save:q,k,v,attention", expert=8),
    _V6E_EXPERTS,
    (*CAPACITY, *BLOCKS_2048),
    (("model.moe.capacity", 1.25),),
  ),
  "v5e_deepseek": Workload(
    "deepseek_v2_lite",
    "v5e-64",
    4096,
    (2, "full"),
    "full",
    Plan(3, "save:attention"),
    _V5E,
    name="deepseek2-16b",
  ),
  "v5p_mixtral": Workload(
    "mixtral_8x7b",
    "v5p-128",
    4096,
    (36, "full"),
    "full",
    Plan(3, "save:q,k,v,attention,o,gate,up", expert=8),
    _V5P_EXPERTS,
    changes=(("model.moe.capacity", 1.25),),
  ),
  "v5p_deepseek": Workload(
    "deepseek_v3",
    "v5p-512",
    8192,
    (4, "custom"),
    "offload:input",
    Plan(1, "save:attention", expert=8),
    _V5P_EXPERTS,
    (
      "decoder_layer_input=offload",
      "megablox=false",
      "sparse_matmul=false",
      "capacity_factor=1.0",
      "opt_type=adam_pax",
      *(f"sa_block_{name}=2048" for name in ("q", "q_dkv", "q_dq")),
    ),
    (("model.moe.capacity", 1.0),),
    name="deepseek3-671b",
  ),
}

_RUN_MAXTEXT = """
import os, pathlib, sys
import maxtext
from maxtext.trainers.pre_train import train_compile
out, *arguments = sys.argv[1:]
compile_step = train_compile.jit_and_compile
def keep(*args, **kwargs):
  compiled = compile_step(*args, **kwargs)
  pathlib.Path(out).write_text(compiled.as_text())
  return compiled
train_compile.jit_and_compile = keep
base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
train_compile.main(["", base, *arguments])
"""


class Merit(NamedTuple):
  """Chip-microseconds per token.

  Attributes:
    plain: Without kernels.
    whole: With kernels.
    assumed: The part of kernels whose schedule was not found or not understood.
    kernels: Names of the kernels and their calls per step.
  """

  plain: float
  whole: float
  assumed: float
  kernels: str

  def __str__(self):
    doubt = f" ({self.assumed:.1f} of them assumed)" if self.assumed else ""
    return f"{self.plain:.1f} µs without kernels, {self.whole:.1f} with{doubt}: {self.kernels}"


def merit(text, where, tokens, mask=None, folder=None):
  """The figures of a compiled program.

  Args:
    text: The program.
    where: Topology.
    tokens: Tokens of a chip.
    mask: The mask of kernels that do not name it.
    folder: The folder with the schedules, if another process compiled the program.
  """
  chip = where.chip
  found = cost.of_program(hlo.parse(text))
  seconds = sum(found.cycles.values()) / chip.clock + found.moved("exposed") / chip.ici_bandwidth
  seconds += found.unestimated_seconds(chip.hbm_bandwidth, chip.clocked_flops)
  parts = kernels.of_step(found.calls, chip, 0.5, mask=mask, folder=folder)
  names = ", ".join(f"{one.calls:g} x {one.name} {one.seconds:.4f} s" for one in parts)
  return Merit(
    seconds / tokens * 1e6,
    (seconds + sum(one.seconds for one in parts)) / tokens * 1e6,
    sum(one.seconds for one in parts if one.source == kernels.ASSUMED) / tokens * 1e6,
    names,
  )


def ours(work, plan):
  """Compiles our step: (merit, GiB)."""
  where = topology.parse(work.where)
  overrides = {
    "data.seq_len": work.length,
    "data.batch_size": plan.rows * where.num_devices // plan.tensor,
    "model.remat": plan.remat,
    "mesh.tensor": plan.tensor,
    "mesh.expert": plan.expert,
    **dict(work.changes),
  }
  c = lower.resolve(
    config.load(
      f"{ROOT}/configs/llama3_8b.py:{work.preset}",
      [f"--config.{k}={v}" for k, v in overrides.items()],
    )[0]
  )
  compiled = lower.compile_step(c, where)
  return (
    merit(compiled.executable.as_text(), where, plan.rows * work.length // plan.tensor),
    compiled.memory.total / chips.GIB,
  )


def run_maxtext(where, model, rows, length, arguments, flags, folder):
  """Compiles MaxText's step in a process of its own.

  Args:
    where: Topology.
    model: MaxText's name of the model.
    rows: Rows of a chip.
    length: Tokens of a row, all of which a token may attend to if they are before it.
    arguments: Further arguments of MaxText, 'name=value'.
    flags: libtpu's flags.
    folder: Where program and schedules are written.

  Returns:
    The `Merit`.
  """
  folder = pathlib.Path(folder).absolute()
  schedules, out = folder / "schedules", folder / "step.txt"
  schedules.mkdir(parents=True, exist_ok=True)
  with open(folder / "log.txt", "w") as log:
    done = subprocess.run(
      [
        sys.executable,
        "-c",
        _RUN_MAXTEXT,
        str(out),
        f"compile_topology={where.name}",
        "compile_topology_num_slices=1",
        "run_name=plan",
        f"base_output_directory={folder}",
        "dataset_type=synthetic",
        "enable_checkpointing=false",
        "use_iota_embed=true",
        f"model_name={model}",
        f"per_device_batch_size={rows}",
        f"max_target_length={length}",
        *arguments,
      ],
      env=os.environ | {"LIBTPU_INIT_ARGS": " ".join((*flags, *dump.flags(schedules)))},
      cwd=folder,
      stdout=log,
      stderr=subprocess.STDOUT,
    )
  if done.returncode or not out.exists():
    sys.exit(f"MaxText failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
  mask = kernels.Mask(Band(causal=True), length, length)
  return merit(out.read_text(), where, rows * length, mask, schedules)


def maxtext(work, keep):
  """Compiles MaxText's step: `Merit`, or None if MaxText is not installed."""
  if not importlib.util.find_spec("maxtext"):
    return None
  rows, remat = work.theirs
  model, where = work.name or work.preset.replace("_", "-"), topology.parse(work.where)
  with tempfile.TemporaryDirectory() as folder:
    return run_maxtext(
      where,
      model,
      rows,
      work.length,
      [f"remat_policy={remat}", *work.arguments],
      work.flags,
      keep or folder,
    )


def main(arguments):
  if not importlib.util.find_spec("libtpu"):
    print("libtpu is not installed here, nothing was compiled: pip install 'jaxgpt[tpu]' (Linux)")
    return
  options = dict(a.removeprefix("--").split("=", 1) for a in arguments if a.startswith("--"))
  names = [a for a in arguments if not a.startswith("--")]
  parts = [options["only"]] if "only" in options else ["maxtext", "same", "best"]
  for name in names or WORKLOADS:
    work, theirs = WORKLOADS[name], None
    if "maxtext" in parts:
      theirs = maxtext(work, options.get("keep"))
      if theirs is None:
        print("MaxText is not installed here: pip install 'maxtext[tpu]==0.2.5' (Python 3.12)")
      else:
        print(f"{name}: MaxText, {work.theirs[0]} rows, {work.theirs[1]}: {theirs}", flush=True)
    for word, plan in (("same", Plan(work.theirs[0], work.same)), ("best", work.ours)):
      if word in parts:
        took, memory = ours(work, plan)
        print(f"{name}: ours, {word}: {plan}; {memory:.1f} GiB: {took}", flush=True)
        if theirs:
          plain, whole = took.plain / theirs.plain, took.whole / theirs.whole
          print(f"{name}: {word}: {plain:.3f} of MaxText's without kernels, {whole:.3f} with")


if __name__ == "__main__":
  main(sys.argv[1:])
