"""What log lines cost next to a training step of the demo's model.

  python tests/benchmarks/metric_writers.py [--rounds=5] [--lines=200]

The step is that of `configs/demo.py`, compiled, on text of this checkout. A log line is what the
training loop writes with `log.every` steps between two of them: metrics of the demo, read from the
timer and the memory counters, and given to the writers. What is printed goes to /dev/null. Steps
and lines take turns. Prints microseconds per line, and the share of a step by CPU time, which
other programs change less: with a line at each step, and with the demo's `log.every`.
"""

import argparse
import contextlib
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import train_loop

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 0.01  # of a step
SETUPS = {  # name: keys of `log` that are on; None: no writer at all
  "no writer": None,
  "terminal and metrics.jsonl, which are always on": {},
  "and metrics.csv": {"log.csv": True},
  "and TensorBoard": {"log.tensorboard": True},
  "and both": {"log.csv": True, "log.tensorboard": True},
}


def demo_step(folder):
  """The demo's model: (config, mesh, a function that runs a step).

  The function returns the seconds of the step and its CPU time.
  """
  import jax

  from jaxgpt import config

  texts = [str(ROOT / name) for name in ("docs", "jaxgpt", "README.md")]
  words = [sys.executable, "-m", "jaxgpt", "data", *texts, f"--out={folder}/data"]
  subprocess.run([*words, "--tokenizer=sentencepiece:4096"], check=True, capture_output=True)
  c, _ = config.load(ROOT / "configs" / "demo.py", [f"--config.data.path={folder}/data"])
  c, mesh, compiled, state, batch = train_loop.first_step(c)

  def step():
    nonlocal state
    start, busy = time.perf_counter(), time.process_time()
    state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - start, time.process_time() - busy

  return c, mesh, step


def line_seconds(c, mesh, folder, keys, lines):
  """(seconds, CPU time of this thread) of each log line with some writers, in a new folder."""
  from jaxgpt.run import metric_writers, throughput
  from jaxgpt.run.process import memory
  from jaxgpt.training import metrics as metrics_lib

  c = c.copy_and_resolve_references()
  c.update_from_flattened_dict(keys or {})
  folder.mkdir()
  made = metric_writers.Writers() if keys is None else metric_writers.make(c, folder, 0)
  means, timer, out = metrics_lib.Means(), throughput.Timer(), []
  step = {"loss": 2.5, "nll": 2.5, "grad_norm": 1.25, "lr": 1e-3, "param_norm": 60.0}
  with contextlib.closing(made):
    for number in range(1, lines + 1):
      means.add(step | {"tokens": 2048})
      timer.step_done(2048)
      start, busy = time.perf_counter(), time.thread_time()
      found = means.take() | timer.take() | {"epochs/data": number / lines}
      made.write(number, "train", found | memory.used(mesh.local_devices))
      out.append((time.perf_counter() - start, time.thread_time() - busy))
  return out


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--lines", type=int, default=200)
  args = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  from jaxgpt.parallel import mesh as mesh_lib

  mesh_lib.prepare_cpu()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    c, mesh, step = demo_step(folder)
    step()
    steps, lines = [], {name: [] for name in SETUPS}
    for round_ in range(args.rounds):
      steps += [step() for _ in range(3)]
      for i, (name, keys) in enumerate(SETUPS.items()):
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
          run = folder / f"{round_}-{i}"
          lines[name] += line_seconds(c, mesh, run, keys, args.lines)
  seconds, busy = (statistics.median(found) for found in zip(*steps))
  every, most = c.log.every, 0.0
  print(f"a step of the demo's model: {seconds * 1e3:.0f} ms, {busy * 1e3:.0f} ms of CPU time")
  for name, found in lines.items():
    took, used = (statistics.mean(one) for one in zip(*found))
    share = used / busy
    most = max(most, share)
    print(
      f"{name:48} {took * 1e6:6.0f} µs a line, {used * 1e6:6.0f} µs of CPU time: {share:.3%} of a "
      f"step's; with log.every={every} {share / every:.4%}"
    )
  print(f"ratio of the dearest to the limit, {LIMIT:.0%} of a step: {most / LIMIT:.2f}")


if __name__ == "__main__":
  main()
