"""Does a long run leak? Thousands of small steps with saves and evaluations, in one process.

  python -m tests.faults.soak [--steps=5000]

Trains a model of one layer, saves and evaluates every 50 steps, and notes the resident memory, the
threads and the open files of the process at each twentieth of the run. Prints them, and how the
last quarter differs from the second one. The first quarter fills caches.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import NamedTuple

from tests import xla_flags

EVERY = 50  # steps between saves, and between evaluations
SAMPLES = 20
MEMORY = 0.02  # growth from the second quarter to the last one that counts as flat


class Sample(NamedTuple):
  """What the process held after a step. `memory` in MiB."""

  step: int
  memory: float
  threads: int
  files: int


def sample(step: int) -> Sample:
  """What this process holds now."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  memory = pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
  return Sample(step, memory, thread_count(), len(os.listdir("/proc/self/fd")))


def thread_count() -> int:
  """Threads of this process, those of libraries included."""
  return len(os.listdir("/proc/self/task"))


def train(folder: pathlib.Path, steps: int) -> list[Sample]:
  """Trains for some steps in a folder, and returns the samples."""
  from jaxgpt import config
  from jaxgpt.parallel import mesh
  from jaxgpt.run import metric_writers
  from jaxgpt.training import loop

  mesh.prepare_cpu()
  found: list[Sample] = []

  class Sampler(metric_writers.MetricWriter):
    def write(self, step: int, kind: str, metrics: object) -> None:
      if kind == "train" and step % (steps // SAMPLES) == 0:
        found.append(sample(step))

  metric_writers.WRITERS._entries["sampler"] = metric_writers.Entry(lambda run: Sampler())
  c = config.base()
  c.model.update(dict(num_layers=1, width=32, num_heads=2))
  c.data.update(dict(path=str(folder / "data"), seq_len=32, batch_size=8, threads=2))
  c.schedule.warmup_steps = 2
  c.train.steps = steps
  c.log.every = 10
  c.eval.update(dict(every=EVERY, batches=2))
  c.checkpoint.update(dict(every=EVERY, best="loss"))
  loop.train(c, folder / "run", config.flatten(c))
  return found


def growth(found: list[Sample]) -> dict[str, float]:
  """How the medians of the last quarter differ from those of the second one.

  Args:
    found: Samples at equal distances.

  Returns:
    {'memory': as a fraction, 'threads' and 'files': numbers}.
  """
  quarter = len(found) // 4
  second, last = found[quarter : 2 * quarter], found[-quarter:]
  median = lambda samples, key: statistics.median(getattr(s, key) for s in samples)
  memory = median(last, "memory") / median(second, "memory") - 1
  counts = {key: median(last, key) - median(second, key) for key in ("threads", "files")}
  return {"memory": memory, **counts}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=5000)
  args = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["XLA_FLAGS"] = xla_flags.COMPILE_QUICKLY
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    (folder / "texts").mkdir()
    for i in range(100):
      (folder / "texts" / f"{i}.txt").write_text(" ".join(str(i * j) for j in range(300)))
    words = [sys.executable, "-m", "jaxgpt", "data", f"{folder}/texts", f"--out={folder}/data"]
    words += ["--tokenizer=bytes", "--validation=0.1"]
    subprocess.run(words, check=True, capture_output=True)
    found = train(folder, args.steps)
  print("step    memory MiB  threads  open files")
  for s in found:
    print(f"{s.step:<7} {s.memory:10.1f} {s.threads:8} {s.files:11}")
  grown = growth(found)
  print(
    f"last quarter against the second: memory {grown['memory']:+.2%}, "
    f"threads {grown['threads']:+g}, open files {grown['files']:+g}"
  )
  return int(grown["memory"] > MEMORY or grown["threads"] > 0 or grown["files"] > 0)


if __name__ == "__main__":
  sys.exit(main())
