"""Does the account of wall time add up? A run with kills and a preemption, timed from outside.

  python -m tests.faults.goodput [--kills=3] [--seed=0]

Trains a small model in processes of its own: some are killed by SIGKILL at random steps, one is
preempted by SIGTERM, and the last one ends the run. Between two starts nothing runs for some
seconds. The script's own clock says how long each process lived, and `metrics.jsonl` which step it
had reached. Both are compared with what `jaxgpt goodput` finds in the run folder.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from tests import xla_flags

STEPS, EVERY = 240, 20
PAUSE = 2.0  # seconds between two starts
TOLERANCE = 0.01  # of the wall time, for its sum
BETWEEN = 0.02  # of the wall time, for the time between starts: signs of life come twice a second
CONFIG = f"""
from jaxgpt import config


def get_config():
  c = config.base()
  c.model.update(dict(num_layers=2, width=64, num_heads=4))
  c.data.update(dict(seq_len=64, batch_size=8, threads=1))
  c.schedule.warmup_steps = 2
  c.train.steps = {STEPS}
  c.log.every = 1
  c.eval.update(dict(every=50, batches=4))
  c.checkpoint.every = {EVERY}
  return c
"""


class Measured(NamedTuple):
  """What the script's clock and the metrics said.

  Attributes:
    wall: Seconds from the launch of the first process to the end of the last.
    between: Seconds in which no process ran.
    repeated: Steps that were done twice.
    codes: Exit codes of the starts.
  """

  wall: float
  between: float
  repeated: int
  codes: list[int]


def _last_step(run: pathlib.Path) -> int:
  path = run / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  steps = []
  for line in lines:
    try:
      steps.append(json.loads(line)["step"])
    except ValueError:  # the end of a killed process's file
      continue
  return max(steps, default=0)


def _saved(run: pathlib.Path) -> int:
  names = [p.name for p in (run / "checkpoints").glob("*") if p.name.isdecimal()]
  return max(map(int, names), default=0)


def measure(folder: pathlib.Path, kills: int, seed: int) -> Measured:
  """Trains with kills and a preemption, and times it from outside. The run is in folder/run."""
  draw, run = random.Random(seed), folder / "run"
  (folder / "c.py").write_text(CONFIG)
  (folder / "texts").mkdir()
  for i in range(200):
    (folder / "texts" / f"{i}.txt").write_text(" ".join(str(i * j) for j in range(400)))
  words = [sys.executable, "-m", "jaxgpt", "data", f"{folder}/texts", f"--out={folder}/data"]
  words += ["--tokenizer=bytes", "--validation=0.1"]
  subprocess.run(words, check=True, capture_output=True)
  words = [sys.executable, "-m", "jaxgpt", "train", f"--config={folder}/c.py"]
  words += [f"--config.data.path={folder}/data", f"--workdir={run}"]
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags.COMPILE_QUICKLY}
  signals = [signal.SIGKILL] * kills + [signal.SIGTERM]
  draw.shuffle(signals)
  marks = sorted(draw.sample(range(EVERY, STEPS - 5), len(signals)))
  began, between, repeated, codes = time.time(), 0.0, 0, list[int]()
  for number, at in zip([*signals, None], [*marks, STEPS]):
    with (folder / "log").open("a") as log:
      process = subprocess.Popen(words, env=env, stdout=log, stderr=log)
    while number is not None and _last_step(run) < at and process.poll() is None:
      time.sleep(0.02)
    if number is not None:
      process.send_signal(number)
    codes.append(process.wait())
    ended = time.time()
    if number is not None:
      repeated += max(_last_step(run) - _saved(run), 0)
      time.sleep(PAUSE)
      between += time.time() - ended
  assert codes[-1] == 0, (folder / "log").read_text()[-2000:]
  return Measured(ended - began, between, repeated, codes)


def account(run: pathlib.Path) -> dict:
  """What `jaxgpt goodput` says of a run."""
  words = [sys.executable, "-m", "jaxgpt", "goodput", str(run), "--json"]
  return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=3)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    measured = measure(pathlib.Path(name), args.kills, args.seed)
    found = account(pathlib.Path(name) / "run")
  print(f"exit codes {measured.codes}")
  for part, seconds in found["parts"].items():
    print(f"  {part:<18} {seconds:8.1f} s  {seconds / found['seconds']:6.1%}")
  gap = found["seconds"] / measured.wall - 1
  print(f"account {found['seconds']:.1f} s, clock {measured.wall:.1f} s: {gap:+.2%}")
  between = found["parts"].get("between starts", 0.0)
  off = (between - measured.between) / measured.wall
  print(
    f"between starts {between:.1f} s, clock {measured.between:.1f} s: {off:+.2%} of the wall time"
  )
  print(f"repeated steps {found['repeated_steps']}, by metrics and checkpoints {measured.repeated}")
  right = abs(gap) <= TOLERANCE and abs(off) <= BETWEEN
  return int(not right or found["repeated_steps"] != measured.repeated)


if __name__ == "__main__":
  sys.exit(main())
