"""The memory that arithmetic predicts, beside what libtpu allocates, over many configs.

  python tests/benchmarks/plan_memory.py [--minutes=N] [NAME…]      (needs jaxgpt[tpu]; no TPU)

Compiles each case below that is not in `tests/plan/memory.json` as it is written here and with this
libtpu, rewrites that file after each, and prints the table. A case takes 20 s to 3 minutes on one
core; after an interruption, or the minutes given, the next start goes on. With names: those, anew.
`tests/plan/memory_test.py` holds the arithmetic against the file.
"""

import gc
import importlib.metadata
import json
import math
import pathlib
import sys
import time

from jaxgpt.plan import environment

environment.prepare()

from jaxgpt import config, mesh  # noqa: E402
from jaxgpt.plan import estimate, lower, topology  # noqa: E402

FILE = pathlib.Path(__file__).parents[1] / "plan" / "memory.json"
SAVE = "save:q,k,v,attention,gate,up"


def case(name, where, rows, length, remat, **values):
  """(preset and what is special, preset, topology, overrides); `__` in a key stands for a dot.

  Args:
    name: a preset, and perhaps a comma and a word.
    rows, length: the global batch.
  """
  values = {"data__batch_size": rows, "data__seq_len": length, "model__remat": remat} | values
  preset, _, _ = name.partition(",")
  if values.get("objective__name") == "masked_lm":
    values["objective__z_loss"] = 0.0
  return (f"{name} {where} {rows} x {length} {remat}", f"configs/llama3_8b.py:{preset}", where,
          [f"--config.{k.replace('__', '.')}={v}" for k, v in values.items()])


CASES = [
    case("gpt2_124m,data", "v5e-8", 64, 1024, "none", mesh__data=8, mesh__fsdp=1,
         model__vocab_size=50304),
    case("llama2_7b", "v5p-128", 256, 4096, SAVE),
    case("llama32_1b", "v5e-8", 16, 2048, SAVE, mesh__fsdp=8),
    case("qwen25_0_5b,accumulate", "v5e-8", 64, 2048, SAVE, optim__accumulate=4),
    case("llama2_7b", "v5e-256", 512, 2048, SAVE),
    case("bert_base,masked", "v5e-8", 512, 512, "save:q,k,v,attention,up", mesh__data=8,
         mesh__fsdp=1, model__vocab_size=30592, objective__name="masked_lm"),
    case("llama2_7b,tensor", "v5e-64", 64, 2048, SAVE, mesh__fsdp=16, mesh__tensor=4),
    case("mixtral_8x7b,expert", "v5p-128", 64, 4096, "save:q,k,v,attention", mesh__fsdp=8,
         mesh__expert=8, model__moe__capacity=1.25),
    case("gemma2_2b", "v6e-16", 32, 2048, SAVE),
    case("llama3_8b,seq", "v5e-256", 64, 8192, SAVE, mesh__fsdp=64, mesh__seq=4),
    case("llama3_8b", "v6e-64", 64, 8192, "save:q,k,v,attention"),
    case("llama3_8b,slices", "v6e-64x2", 128, 4096, SAVE, mesh__data=2, mesh__fsdp=64),
    case("gpt2_1558m", "v5e-16", 64, 1024, "save:q,k,v,attention,up", optim__name="lion",
         model__vocab_size=50304),
    case("qwen3_0_6b,adafactor", "v6e-8", 32, 4096, "save:q,k,v,attention",
         optim__name="adafactor"),
    case("qwen25_1_5b", "v5e-16", 32, 4096, "save:attention"),
    case("smollm2_1_7b,ema", "v5e-16", 32, 2048, "full", optim__ema=0.999),
    case("llama32_3b,tensor", "v4-64", 64, 4096, SAVE, mesh__fsdp=16, mesh__tensor=2),
    case("llama2_13b", "v5p-64", 128, 4096, "dots"),
    case("gemma3_1b,accumulate", "v5e-16", 64, 4096, "save_qkv", optim__accumulate=2),
    case("mistral_7b_v03,slices", "v5e-64x2", 256, 4096, "save:q,k,v,attention", mesh__data=2,
         mesh__fsdp=64),
    case("modernbert_base,masked", "v6e-8", 64, 2048, "save:q,k,v,attention,gate,up",
         model__vocab_size=50432, objective__name="masked_lm"),
    case("qwen3_8b,muon", "v5p-64", 64, 4096, SAVE, optim__name="muon"),
    case("olmo2_1b", "v4-16", 32, 4096, "save_attention"),
    case("gpt2_355m", "v6e-8", 128, 1024, "full", model__vocab_size=50304),
    case("phi3_mini", "v6e-16", 32, 4096, SAVE),
    case("llama31_70b", "v5p-256", 128, 8192, "save:q,k,v,attention"),
    case("gemma2_9b,tensor", "v5p-64", 32, 4096, SAVE, mesh__fsdp=16, mesh__tensor=2),
    case("qwen3_30b_a3b,expert", "v5p-128", 64, 4096, "save:q,k,v,attention", mesh__fsdp=8,
         mesh__expert=8, model__moe__capacity=1.0),
    case("llama2_70b,tensor", "v5p-128", 64, 4096, "save:q,k,v,attention", mesh__fsdp=16,
         mesh__tensor=4),
    case("starcoder2_3b", "v5e-64", 64, 4096, "save:q,k,v,attention,up"),
    case("llama3_8b,tensor", "v6e-64", 64, 8192, SAVE, mesh__fsdp=32, mesh__tensor=2),
    case("bert_large,masked", "v4-16", 256, 512, "none", model__vocab_size=30592,
         objective__name="masked_lm"),
    case("llama31_8b,seq", "v5p-128", 16, 32768, "save:q,k,v,attention", mesh__fsdp=16,
         mesh__seq=4),
    case("mixtral_8x7b,expert tensor", "v5p-256", 64, 4096, "save:attention", mesh__fsdp=4,
         mesh__expert=8, mesh__tensor=4, model__moe__capacity=1.25),
]


def predicted(path, where, overrides):
  """Bytes of a device by arithmetic alone."""
  c = lower.resolve(config.load(path, overrides)[0])
  sizes = mesh.axis_sizes(c.mesh, topology.parse(where).num_devices)
  return estimate.memory(estimate.buffers(c, sizes, estimate.count(c)))


def compiled(path, where, overrides):
  """What libtpu allocates, as the file has it; its `memory` is None where it does not fit."""
  c = lower.resolve(config.load(path, overrides)[0])
  found = {"config": path, "topology": where, "overrides": overrides,
           "libtpu": importlib.metadata.version("libtpu"),
           "jax": importlib.metadata.version("jax")}
  try:
    step = lower.compile_step(c, topology.parse(where))
  except lower.OutOfMemory as e:
    return found | {"memory": None, "needed": e.needed}
  return found | {"memory": step.memory._asdict(), "total": step.memory.total,
                  "seconds": round(step.seconds)}


def main():
  argv = [a for a in sys.argv[1:] if not a.startswith("--minutes=")]
  minutes = next((float(a[10:]) for a in sys.argv[1:] if a.startswith("--minutes=")), math.inf)
  known = json.loads(FILE.read_text()) if FILE.exists() else {}
  version, began, errors = importlib.metadata.version("libtpu"), time.monotonic(), []
  for name, path, where, overrides in CASES:
    old = known.get(name)
    stale = not old or (old["overrides"], old["libtpu"]) != (overrides, version)
    if name in argv or (not argv and stale and time.monotonic() - began < 60 * minutes):
      known[name] = old = compiled(path, where, overrides)
      kept = {n: known[n] for n, *_ in CASES if n in known}
      FILE.write_text(json.dumps(kept, indent=1) + "\n")
      gc.collect()
    if not old:
      continue
    got = predicted(path, where, overrides) / 2**30
    if old["memory"] is None:
      print(f"{name:<76} needs {old['needed'] / 2**30:6.2f} and does not fit; arithmetic "
            f"{got:6.2f}", flush=True)
      continue
    errors.append(abs(got / (old["total"] / 2**30) - 1))
    print(f"{name:<76} {old['total'] / 2**30:6.2f} GiB, by arithmetic {got:6.2f}, "
          f"{got / (old['total'] / 2**30) - 1:+6.1%}; {old['seconds']} s", flush=True)
  print(f"{len(errors)} configs, {sum(e <= 0.1 for e in errors)} within 10 %, the worst "
        f"{max(errors, default=0):.1%} away")


if __name__ == "__main__":
  main()
