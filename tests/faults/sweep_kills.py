"""A sweep of 24 runs that is killed at random moments ends with the table of one that was not.

  python -m tests.faults.sweep_kills --kills=5 --seed=0

Every second kill takes the process of the sweep alone: its worker finds its input closed, saves and
ends. The others take the worker too, in the middle of whatever it does. The same command is then
given again. The first of the two sweeps is not disturbed.
"""

import argparse
import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from jaxgpt.text.prepare import prepare
from tests import xla_flags

CONFIG = """
from jaxgpt import config
from jaxgpt.analysis.sweep import Halving, Sweep


def get_config():
  c = config.base()
  c.model.update(dict(num_layers=1, width=16, num_heads=2))
  c.data.update(dict(path="data", seq_len=32, batch_size=8, threads=1))
  c.schedule.warmup_steps = 2
  c.train.steps = 8
  c.log.every = 2
  c.eval.update(dict(every=4, batches=1))
  c.checkpoint.every = 3
  return c


def get_sweep():
  return Sweep(
    grid={"optim.lr": (1e-3, 1e-2, 1e-1, 1e6), "optim.b2": (0.9, 0.95, 0.99)},
    seeds=(0, 1),
    halving=Halving(steps=(4,), keep=0.5),
  )
"""
FILES = ("table.txt", "table.json")
LIMIT = 3600  # seconds of one start


def prepare_folder(folder: pathlib.Path) -> None:
  """Writes the sweep file and its data."""
  words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs"]
  for i in range(40):
    text = " ".join(words[(i * j + j // 3) % 10] for j in range(10 + 3 * i))
    (folder / f"{i:02}.txt").write_text(text + "\n")
  prepare.prepare([folder], folder / "data", tokenizer="bytes", validation=0.2, test=0, cut_chars=0)
  (folder / "sweep.py").write_text(CONFIG)


def start(folder: pathlib.Path, name: str) -> subprocess.Popen[str]:
  """Starts a sweep. All share compiled programs, which are compiled quickly rather than well."""
  command = [sys.executable, "-m", "jaxgpt", "sweep", "--config=sweep.py", f"--workdir={name}"]
  env = os.environ | {
    "XLA_FLAGS": xla_flags.COMPILE_QUICKLY,
    "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
  return subprocess.Popen(command, cwd=folder, env=env, text=True, **pipes)


def finish(folder: pathlib.Path, name: str) -> str:
  """Runs a sweep to its end. Returns what it printed."""
  process = start(folder, name)
  out, _ = process.communicate(timeout=LIMIT)
  assert process.returncode == 0, out
  return out


def strike(folder: pathlib.Path, name: str, source: random.Random, with_worker: bool) -> bool:
  """Starts a sweep and kills it at a random moment. Returns False if it was done before."""
  process = start(folder, name)
  assert process.stdout is not None
  for _ in range(source.randint(1, 5)):  # lines, most of them one per run
    process.stdout.readline()
  time.sleep(source.uniform(0, 3))
  children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
  workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
  alive = process.poll() is None
  process.kill()
  for pid in workers if with_worker else ():
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)
  process.wait()
  process.stdout.close()
  return alive


def run(folder: pathlib.Path, kills: int, seed: int) -> list[str]:
  """Strikes a sweep, and returns what differs from the undisturbed one."""
  prepare_folder(folder)
  first = finish(folder, "undisturbed")
  print(first, flush=True)
  source = random.Random(seed)
  for i in range(kills):
    alive = strike(folder, "struck", source, with_worker=i % 2 == 1)
    print(f"kill {i + 1}: {'struck' if alive else 'it was done already'}", flush=True)
  print(finish(folder, "struck"), flush=True)
  texts = {
    name: [(folder / x / name).read_text() for x in ("undisturbed", "struck")] for name in FILES
  }
  return [name for name, (a, b) in texts.items() if a.replace("undisturbed", "struck") != b]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--kills", type=int, default=5)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    differing = run(pathlib.Path(folder), args.kills, args.seed)
  print(f"differ: {', '.join(differing)}" if differing else "the tables are equal, to the bit")
  return 1 if differing else 0


if __name__ == "__main__":
  sys.exit(main())
