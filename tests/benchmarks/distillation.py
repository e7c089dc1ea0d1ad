"""A student that is distilled against the same student trained alone, over several seeds.

  python tests/benchmarks/distillation.py [SEEDS] [FOLDER]

The data are the docstrings of Python's standard library, in bytes. Prints the validation loss of
the teacher and of each student, and the mean difference with its 95 % interval (Student's t).
"""

import ast
import math
import pathlib
import statistics
import sys
import sysconfig
import tempfile

from jaxgpt import config
from jaxgpt.text.prepare import prepare
from jaxgpt.training import loop

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # quantile by number of seeds


def docstrings(folder: pathlib.Path) -> pathlib.Path:
  """Writes the docstrings of each module of the standard library's top level to a file."""
  folder.mkdir(parents=True, exist_ok=True)
  for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, kinds)]
    if text := "\n\n".join(filter(None, found)):
      (folder / f"{path.stem}.txt").write_text(text)
  return folder


def configured(data: pathlib.Path, layers: int, width: int, steps: int, seed: int = 0):
  """A small model in bytes."""
  c = config.base()
  c.model.update(
    dict(
      num_layers=layers,
      width=width,
      num_heads=4,
      norm="rmsnorm",
      position="rotary",
      activation="silu",
      gated=True,
      bias=False,
    )
  )
  c.seed = seed
  c.data.update(dict(path=str(data), seq_len=64, batch_size=16))
  c.optim.lr = 3e-3
  c.schedule.warmup_steps = 20
  c.train.steps = steps
  c.eval.every = 0
  c.eval.batch_size = 64
  c.checkpoint.every = steps
  c.log.every = 100
  c.mesh.data, c.mesh.fsdp = -1, 1
  return c


def main() -> None:
  seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
  root = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
  data = root / "data"
  if not data.exists():
    prepare.prepare([docstrings(root / "text")], data, tokenizer="bytes", validation=0.1, test=0.0)
  teacher = root / "teacher"
  result = loop.train(configured(data, 3, 96, 1000), teacher, {}).result
  assert result is not None
  print(f"teacher: validation loss {result['loss']:.4f}", flush=True)
  gains = []
  for seed in seeds:
    found = {}
    for name in ("alone", "distilled"):
      c = configured(data, 1, 48, 1000, seed)
      if name == "distilled":
        c.objective.update(dict(name="distillation", teacher=str(teacher), teacher_share=0.9))
      result = loop.train(c, root / f"{name}{seed}", {}).result
      assert result is not None
      found[name] = result["loss"]
    gains.append(found["alone"] - found["distilled"])
    pair = f"alone {found['alone']:.4f}, distilled {found['distilled']:.4f}"
    print(f"seed {seed}: {pair}", flush=True)
  mean = statistics.mean(gains)
  half = T_95[len(gains)] * statistics.stdev(gains) / math.sqrt(len(gains))
  print(f"distillation lowers the validation loss by {mean:.4f} ± {half:.4f} nats per byte")


if __name__ == "__main__":
  main()
