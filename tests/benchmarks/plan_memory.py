"""Predicted and compiled memory per device over many configs: arithmetic against libtpu.

  python tests/benchmarks/plan_memory.py [--minutes=N] [NAME...]      (needs jaxgpt[tpu], no TPU)
  python tests/benchmarks/plan_memory.py --gpus                      (needs jaxgpt[cuda], no GPU)

Compiles each case below that `tests/plan/memory_estimate.json` lacks for this case and libtpu,
rewrites the file after each, and prints the table. Use libtpu 0.0.52: libtpu 0.0.50.1 reports
more than the heap it plans (docs/log.md). A case takes 20 s to 5 minutes on one core. After an
interruption, or after the given minutes, the next start continues. Given names are compiled
again. `tests/plan/memory_estimate_test.py` compares the arithmetic with the file. With --gpus it
compiles a few programs for H100s, and only prints them.
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

from jaxgpt import config
from jaxgpt.plan import lower, memory_estimate, topology

FILE = pathlib.Path(__file__).parents[1] / "plan" / "memory_estimate.json"
SAVE = "save:q,k,v,attention,gate,up"
SAVE_O = "save:q,k,v,attention,o,gate,up"


def case(name, where, rows, length, remat, **values):
  """Returns (name, preset, topology, overrides) of a case. `__` in a key stands for a dot.

  Args:
    name: a preset, and perhaps a comma and a word.
    rows, length: the global batch.
  """
  values = {"data__batch_size": rows, "data__seq_len": length, "model__remat": remat} | values
  preset, _, _ = name.partition(",")
  if values.get("objective__name") == "masked_lm":
    values["objective__z_loss"] = 0.0
  return (
    f"{name} {where} {rows} x {length} {remat}",
    f"configs/llama3_8b.py:{preset}",
    where,
    [f"--config.{k.replace('__', '.')}={v}" for k, v in values.items()],
  )


def narrow(layers=768, heads=2, kv_heads=2, head_dim=128, mlp=768, vocab=4096):
  """A model cut to a narrow and deep one, which compiles in seconds. What it saves of all layers
  is too large for VMEM, where the compiler would keep some of it otherwise."""
  return dict(
    model__num_layers=layers,
    model__width=256,
    model__num_heads=heads,
    model__num_kv_heads=kv_heads,
    model__head_dim=head_dim,
    model__mlp_width=mlp,
    model__vocab_size=vocab,
  )


EXPERTS = dict(model__moe__experts=8, model__moe__capacity=1.25, model__moe__width=256)
QKVA = "save:q,k,v,attention"
CASES = [
  case("llama2_7b,narrow", "v5e-16", 32, 256, SAVE, **narrow()),
  case("llama2_7b,narrow", "v5e-64", 64, 512, QKVA, **narrow()),
  case(
    "llama3_8b,narrow", "v6e-16", 32, 256, "save:q,k,v,attention,o,gate,up", **narrow(kv_heads=1)
  ),
  case("llama3_8b,narrow full", "v5p-32", 64, 256, "full", **narrow(1536)),
  case("llama31_8b,narrow dots", "v4-32", 32, 256, "dots", **narrow()),
  case("llama32_1b,narrow", "v5e-16", 32, 256, "save_qkv", **narrow(1152, 4, 2, 64)),
  case("llama3_8b,narrow seq", "v5e-16", 16, 512, SAVE, mesh__fsdp=8, mesh__seq=2, **narrow()),
  case("llama2_7b,narrow seq", "v5p-32", 4, 2048, QKVA, mesh__fsdp=4, mesh__seq=4, **narrow()),
  case(
    "llama3_8b,narrow tensor", "v6e-16", 16, 512, SAVE, mesh__fsdp=8, mesh__tensor=2, **narrow()
  ),
  case("qwen25_7b,narrow tensor", "v4-32", 32, 512, QKVA, mesh__fsdp=8, mesh__tensor=2, **narrow()),
  case(
    "mixtral_8x7b,narrow expert",
    "v5p-32",
    32,
    256,
    QKVA,
    mesh__fsdp=4,
    mesh__expert=4,
    **narrow(288),
    **EXPERTS,
  ),
  case(
    "qwen3_30b_a3b,narrow expert",
    "v6e-16",
    32,
    256,
    "full",
    mesh__fsdp=4,
    mesh__expert=4,
    **narrow(288),
    **EXPERTS,
  ),
  case(
    "llama2_7b,narrow slices", "v5e-16x2", 64, 256, SAVE, mesh__data=2, mesh__fsdp=16, **narrow()
  ),
  case(
    "mistral_7b_v03,narrow slices",
    "v6e-16x2",
    64,
    256,
    QKVA,
    mesh__data=2,
    mesh__fsdp=16,
    **narrow(),
  ),
  case("llama2_7b,narrow accumulate", "v5e-32", 256, 256, SAVE, optim__accumulate=4, **narrow()),
  case("qwen3_8b,narrow accumulate", "v5p-32", 64, 256, QKVA, optim__accumulate=2, **narrow()),
  case("gemma2_9b,narrow", "v6e-32", 64, 256, SAVE, **narrow(768, vocab=8192)),
  case("gemma3_1b,narrow", "v5e-16", 32, 256, QKVA, **narrow(576, kv_heads=1, vocab=8192)),
  case("gemma_7b,narrow", "v5p-32", 32, 256, "save:attention", **narrow(1152)),
  case(
    "gpt2_124m,narrow", "v5e-16", 32, 256, "save:q,k,v,attention,up", **narrow(768, 4, 4, 64, 1024)
  ),
  case(
    "gpt2_1558m,narrow lion",
    "v6e-16",
    64,
    256,
    "save:q,k,v,attention,up",
    optim__name="lion",
    **narrow(768, mlp=1024),
  ),
  case(
    "bert_base,narrow masked",
    "v5e-16",
    64,
    256,
    "save:q,k,v,attention,up",
    objective__name="masked_lm",
    **narrow(768, 4, 4, 64, 1024),
  ),
  case(
    "modernbert_base,narrow masked",
    "v5p-32",
    64,
    256,
    QKVA,
    objective__name="masked_lm",
    **narrow(756, mlp=512),
  ),
  case("qwen3_0_6b,narrow adafactor", "v5e-16", 32, 256, QKVA, optim__name="adafactor", **narrow()),
  case("qwen3_8b,narrow muon", "v6e-16", 32, 256, SAVE, optim__name="muon", **narrow(576)),
  case("smollm2_1_7b,narrow ema", "v5e-32", 64, 256, SAVE, optim__ema=0.999, **narrow()),
  case("olmo2_7b,narrow", "v6e-16", 32, 256, QKVA, **narrow()),
  case("phi3_mini,narrow", "v5p-32", 32, 256, SAVE, **narrow()),
  case(
    "starcoder2_3b,narrow", "v5e-16", 32, 256, "save:q,k,v,attention,up", **narrow(768, mlp=1024)
  ),
  case("llama2_13b,narrow none", "v5e-16", 32, 256, "none", **narrow(384)),
  case(
    "qwen25_1_5b,narrow data", "v6e-8", 32, 256, SAVE, mesh__data=8, mesh__fsdp=1, **narrow(384)
  ),
  # Attention that keeps a number for each pair of a query and a key.
  case(
    "llama2_7b,narrow reference",
    "v5e-16",
    32,
    512,
    QKVA,
    model__attention="reference",
    **narrow(384, 8, 8),
  ),
  case(
    "llama3_8b,narrow reference",
    "v6e-16",
    16,
    256,
    "none",
    model__attention="reference",
    **narrow(192, 4, 2),
  ),
  case(
    "gemma2_9b,narrow batched",
    "v5p-32",
    16,
    512,
    "none",
    model__attention="batched",
    **narrow(192, 8, 4),
  ),
  case("llama3_8b,narrow wide vocabulary", "v5e-16", 32, 256, SAVE, **narrow(576, vocab=32768)),
  case("llama2_7b", "v5e-256", 512, 2048, SAVE),
  case("llama2_7b", "v5e-256", 512, 2048, SAVE_O),
  case("llama2_7b,gradients", "v5e-256", 512, 2048, SAVE, model__materialize="gradients"),
  case("llama2_7b", "v5e-256", 512, 2048, "full"),
  case("llama2_7b,seq", "v5e-256", 512, 2048, SAVE, mesh__fsdp=128, mesh__seq=2),
  case("llama2_7b,seq", "v5e-256", 512, 2048, SAVE_O, mesh__fsdp=128, mesh__seq=2),
  case("llama2_7b,seq 4", "v5e-256", 512, 2048, SAVE, mesh__fsdp=64, mesh__seq=4),
  case("llama2_7b,seq 4", "v5e-256", 512, 2048, SAVE_O, mesh__fsdp=64, mesh__seq=4),
  case("llama2_7b", "v5p-128", 192, 4096, SAVE),
  case("llama2_7b", "v5p-128", 192, 4096, SAVE_O),
  case("llama2_7b", "v5p-128", 256, 4096, SAVE),
  case("llama2_7b", "v5p-128", 256, 4096, SAVE_O),
  case("llama2_7b", "v5p-128", 256, 4096, "save:q,k,v,o,gate,up,down"),
  case("llama2_7b", "v5p-128", 384, 4096, SAVE),
  case("llama2_7b", "v5p-128", 384, 4096, SAVE_O),
  case("llama2_7b,gradients", "v5p-128", 384, 4096, SAVE_O, model__materialize="gradients"),
  case("llama2_70b", "v5p-128", 64, 4096, SAVE),
  case("llama2_70b", "v5p-128", 64, 4096, SAVE_O),
  case("llama2_70b,gradients", "v5p-128", 64, 4096, SAVE_O, model__materialize="gradients"),
  case("llama2_70b", "v5p-128", 128, 4096, "save:q,k,v,o,down"),
  case("llama2_70b,seq", "v5p-128", 64, 4096, SAVE, mesh__fsdp=32, mesh__seq=2),
  case(
    "llama2_70b,seq", "v5p-128", 64, 4096, "save:q,k,v,attention,up", mesh__fsdp=32, mesh__seq=2
  ),
  case("llama2_70b,tensor", "v5p-128", 64, 4096, SAVE, mesh__fsdp=32, mesh__tensor=2),
  case("llama2_70b,tensor", "v5p-128", 64, 4096, SAVE_O, mesh__fsdp=32, mesh__tensor=2),
  case("llama3_8b,tensor", "v6e-64", 64, 8192, SAVE, mesh__fsdp=32, mesh__tensor=2),
  case("llama3_8b", "v6e-64", 64, 8192, SAVE),
  case("llama3_8b", "v5e-256", 256, 8192, "save_attention"),
  case("llama3_8b", "v5p-64", 64, 8192, SAVE),
  case("qwen3_8b", "v6e-64", 128, 4096, QKVA),
  case("gemma2_9b", "v5e-64", 64, 4096, "full"),
  case("mixtral_8x7b,expert", "v5p-128", 128, 4096, QKVA, mesh__fsdp=8, mesh__expert=8),
  case("gpt2_1558m", "v5e-16", 64, 1024, "save:q,k,v,attention,up"),
  case("llama32_1b", "v5e-16", 32, 4096, QKVA),
  case("gemma3_1b,chunks", "v5e-16", 32, 4096, QKVA, objective__loss_chunk=1024),
  case(
    "bert_base,data masked",
    "v5e-4",
    128,
    512,
    "save:q,k,v,attention,up",
    objective__name="masked_lm",
    mesh__data=4,
    mesh__fsdp=1,
  ),
]

GPU_CASES = [
  case("gemma_7b", "h100x8", 8, 2048, "save_qkv"),
  case("gemma_7b", "h100x8", 8, 4096, "save_qkv"),
  case("llama3_8b", "h100x8", 8, 4096, QKVA),
  case("llama3_8b,float32", "h100x8", 8, 4096, QKVA, model__dtype="float32"),
  case("gemma2_9b", "h100x8", 8, 4096, "full"),
  case("gemma2_9b", "h100x8", 8, 512, "none"),
  case("llama3_8b,reference", "h100x8", 8, 1024, "none", model__attention="reference"),
]


def predicted(path, where, overrides):
  """Estimates bytes per device by arithmetic."""
  c = lower.resolve(config.load(path, overrides)[0])
  return memory_estimate.total(c, topology.parse(where))


def compiled(path, where, overrides):
  """Compiles with libtpu: the entry of the file. Its `memory` is None if it does not fit."""
  c = lower.resolve(config.load(path, overrides)[0])
  found = {
    "config": path,
    "topology": where,
    "overrides": overrides,
    "libtpu": importlib.metadata.version("libtpu"),
    "jax": importlib.metadata.version("jax"),
  }
  try:
    step = lower.compile_step(c, topology.parse(where))
  except lower.OutOfMemory as e:
    return found | {"memory": None, "needed": e.needed}
  return found | {
    "memory": step.memory._asdict(),
    "total": step.memory.total,
    "seconds": round(step.seconds),
  }


def of_gpus():
  """Compiles and prints `GPU_CASES`."""
  for name, path, where, overrides in GPU_CASES:
    c = lower.resolve(config.load(path, overrides)[0])
    step = lower.compile_step(c, topology.parse(where))
    got, total = predicted(path, where, overrides) / 2**30, step.memory.total / 2**30
    print(
      f"{name}, attention {step.attention}: {total:.2f} GiB, by arithmetic {got:.2f}, "
      f"{got / total - 1:+.1%}",
      flush=True,
    )


def main():
  if sys.argv[1:] == ["--gpus"]:
    return of_gpus()
  argv = [a for a in sys.argv[1:] if not a.startswith("--minutes=")]
  minutes = next((float(a[10:]) for a in sys.argv[1:] if a.startswith("--minutes=")), math.inf)
  known = json.loads(FILE.read_text()) if FILE.exists() else {}
  version, began, errors = importlib.metadata.version("libtpu"), time.monotonic(), []
  for name, path, where, overrides in CASES:
    if argv and name not in argv:
      continue
    old = known.get(name)
    stale = not old or (old["overrides"], old["libtpu"]) != (overrides, version)
    if argv or (stale and time.monotonic() - began < 60 * minutes):
      known[name] = old = compiled(path, where, overrides)
      kept = {n: known[n] for n, *_ in CASES if n in known}
      FILE.write_text(json.dumps(kept, indent=1) + "\n")
      gc.collect()
    if not old:
      continue
    got = predicted(path, where, overrides) / 2**30
    if old["memory"] is None:
      print(
        f"{name:<76} needs {old['needed'] / 2**30:6.2f} and does not fit; arithmetic {got:6.2f}",
        flush=True,
      )
      continue
    errors.append(abs(got / (old["total"] / 2**30) - 1))
    print(
      f"{name:<76} {old['total'] / 2**30:6.2f} GiB, by arithmetic {got:6.2f}, "
      f"{got / (old['total'] / 2**30) - 1:+6.1%}; {old['seconds']} s",
      flush=True,
    )
  print(
    f"{len(errors)} configs, {sum(e <= 0.1 for e in errors)} within 10 %, the worst "
    f"{max(errors, default=0):.1%} away"
  )


if __name__ == "__main__":
  main()
