"""Chip-microseconds per token, by the TPU compiler's schedule: our plans and MaxText's recipes.

  python tests/benchmarks/plan_maxtext.py [WORKLOAD...]

Needs libtpu, but no TPU. MaxText's tuned recipes are compiled by the same compiler if `pip
install 'maxtext[tpu]==0.2.5'` (Python 3.12) is in the same environment; else its column is empty.
Each of up to twelve programs takes minutes. The figure is (cycles / clock + exposed bytes /
interconnect) divided by the tokens of a chip. Attention kernels carry no estimate and are left
out on both sides.
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
from jaxgpt.parallel import chips
from jaxgpt.plan import cost, hlo, lower, topology

# Flags of the recipes; for v5p without those that libtpu refuses ("continuation fusion").
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


class Workload(NamedTuple):
  """A model on a topology.

  Attributes:
    preset: ours.
    where: topology.
    length: tokens a row.
    theirs: (rows a chip, remat policy) of MaxText's recipe.
    same: the value of model.remat that saves the same.
    ours: (rows a chip, model.remat, mesh.tensor) of the plan that `plan --search` found.
  """

  preset: str
  where: str
  length: int
  theirs: tuple
  same: str
  ours: tuple


WORKLOADS = {
  "v5e_7b": Workload(
    "llama2_7b",
    "v5e-256",
    2048,
    (4, "save_qkv_proj"),
    "save:q,k,v",
    (2, "save:q,k,v,attention,gate,up", 1),
  ),
  "v5e_7b_full": Workload(
    "llama2_7b", "v5e-256", 2048, (2, "full"), "full", (2, "save:q,k,v,attention,gate,up", 1)
  ),
  "v5p_7b": Workload(
    "llama2_7b",
    "v5p-128",
    4096,
    (4, "minimal"),
    "save:q,k,v,o,gate,up,down",
    (6, "save:q,k,v,attention,o,gate,up", 1),
  ),
  "v5p_70b": Workload(
    "llama2_70b",
    "v5p-128",
    4096,
    (2, "save_dot_except_mlpwi"),
    "save:q,k,v,o,down",
    (1, "save:q,k,v,attention,o,gate,up", 2),
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


def merit(text, where, tokens):
  """Returns chip-µs per token, from the text of a compiled program."""
  found = cost.of_program(hlo.parse(text))
  seconds = sum(found.cycles.values()) / where.chip.clock
  return (seconds + found.bytes("exposed") / where.chip.ici_bandwidth) / tokens * 1e6


def ours(work, rows, remat, tensor=1):
  """Compiles our step: (chip-µs per token, GiB)."""
  where = topology.parse(work.where)
  overrides = {
    "data.seq_len": work.length,
    "data.batch_size": rows * where.num_devices,
    "model.remat": remat,
    "mesh.tensor": tensor,
  }
  c = lower.resolve(
    config.load(
      f"{ROOT}/configs/llama3_8b.py:{work.preset}",
      [f"--config.{k}={v}" for k, v in overrides.items()],
    )[0]
  )
  compiled = lower.compile_step(c, where)
  return (
    merit(compiled.executable.as_text(), where, rows * work.length),
    compiled.memory.total / chips.GIB,
  )


def maxtext(work):
  """Compiles MaxText's step: chip-µs per token. None if MaxText is not installed."""
  if not importlib.util.find_spec("maxtext"):
    return None
  rows, remat = work.theirs
  flags = _V5E if work.where.startswith("v5e") else _V5P
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder, "step.txt")
    subprocess.run(
      [
        sys.executable,
        "-c",
        _RUN_MAXTEXT,
        str(out),
        f"compile_topology={work.where}",
        "compile_topology_num_slices=1",
        "run_name=plan",
        f"base_output_directory={folder}",
        "dataset_type=synthetic",
        "enable_checkpointing=false",
        "use_iota_embed=true",
        f"model_name={work.preset.replace('_', '-')}",
        f"remat_policy={remat}",
        f"per_device_batch_size={rows}",
        f"max_target_length={work.length}",
      ],
      env=os.environ | {"LIBTPU_INIT_ARGS": " ".join(flags)},
      cwd=folder,
      check=True,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    return merit(out.read_text(), topology.parse(work.where), rows * work.length)


def main(names):
  if not importlib.util.find_spec("libtpu"):
    print("libtpu is not installed here, nothing was compiled: pip install 'jaxgpt[tpu]' (Linux)")
    return
  for name in names or WORKLOADS:
    work = WORKLOADS[name]
    theirs = maxtext(work)
    if theirs is None:
      print("MaxText is not installed here: pip install 'maxtext[tpu]==0.2.5' (Python 3.12)")
    else:
      print(f"{name}: MaxText, {work.theirs[0]} rows, {work.theirs[1]}: {theirs:.1f} µs")
    for word, plan in (("same", (work.theirs[0], work.same)), ("best", work.ours)):
      took, memory = ours(work, *plan)
      ratio = f", {took / theirs:.3f} of MaxText's" if theirs else ""
      print(f"{name}: ours, {word}, {plan}: {took:.1f} µs, {memory:.1f} GiB{ratio}", flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
