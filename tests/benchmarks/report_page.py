"""The report of 10 runs of 100,000 log lines: its size, and the time until a browser shows it.

  python tests/benchmarks/report_page.py [--runs=10] [--lines=100000] [--rounds=5] [--dir=DIR]

The run folders are made here: they have no checkpoints, and the metrics of a GPU run with a log
line at each step. `jaxgpt report` writes the page. A new Chromium without a window opens it from
the disk in each round. Prints size and times, and their ratios to the limits: 5 MB and 2 seconds.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
MOST_BYTES, MOST_SECONDS = 5_000_000, 2.0
EVERY = 500  # steps between evaluations
# Whether the charts near the screen are drawn; if so, milliseconds since the page was asked for.
DRAWN = "() => visible.size && [...visible].every((chart) => chart.drawn) && performance.now()"


def metrics(rng, lines):
  """(name, values of all log lines) of a training run, as jaxgpt logs them."""
  steps = np.arange(1, lines + 1)
  loss = 2 + 6 * steps**-0.25 + rng.normal(0, 0.05, lines)
  rate = rng.normal(40_000, 900, lines)
  return {
    "grad_norm": rng.lognormal(0, 0.2, lines),
    "loss": loss,
    "nll": loss,
    "lr": 1e-3 * (1 - steps / (lines + 1)),
    "param_norm": 60 + steps**0.3,
    "tokens": np.full(lines, 2048.0),
    "tokens_per_second": rate,
    "step_time": 2048 / rate,
    "input_wait": rng.uniform(0, 1e-3, lines),
    "mfu": rate / 1e5,
    "host_memory": 2e9 + np.cumsum(rng.integers(0, 4096, lines)),
    "device_memory": rng.normal(3e10, 1e7, lines),
    "device_memory_peak": np.full(lines, 4e10),
    "epochs/data": steps / lines,
  }


def make_run(folder, seed, lines):
  """Makes a run folder."""
  from jaxgpt import config
  from jaxgpt.parallel import mesh as mesh_lib
  from jaxgpt.run import metric_writers, run_folder, throughput
  from jaxgpt.text.tokenizers import tokenizer

  c = config.base()
  c.data.path = "runs/report_page/data"
  c.optim.lr = 1e-3 * (seed + 1)
  c.train.steps = c.checkpoint.every = lines
  own = tokenizer.from_spec("bytes", [])
  c.model.vocab_size = own.vocab_size
  c = config.resolve(c)
  origin = dict.fromkeys(config.flatten(c), "base") | {"optim.lr": "command line"}
  run_folder.enter(folder, c, origin, mesh_lib.make(c.mesh), "0" * 64, own)
  rng = np.random.default_rng(seed)
  found = metrics(rng, lines)
  seconds = float(found["step_time"].sum())
  with (folder / metric_writers.JSONL).open("w") as f:
    for i, values in enumerate(zip(*(v.tolist() for v in found.values())), 1):
      record = {"step": i, "kind": "train", **dict(zip(found, values))}
      f.write(json.dumps(record) + "\n")
      if i % EVERY == 0:
        loss = float(found["loss"][i - 1])
        held_out = {"loss": loss, "perplexity": float(np.exp(loss)), "bits_per_byte": loss / 3}
        f.write(json.dumps({"step": i, "kind": "validation", **held_out, "tokens": 9e4}) + "\n")
  spent = dict.fromkeys(throughput.ACTIVITIES, 5.0) | {throughput.STEPS: seconds}
  account = {"began": throughput.utc(time.time() - seconds), "seconds": spent}
  run_folder.note_ended(folder, account)


def write_page(folder, out):
  """(seconds, CPU time in seconds, peak memory in bytes) of `jaxgpt report`."""
  start = os.times()
  words = [sys.executable, "-m", "jaxgpt", "report", str(folder), f"--out={out}"]
  print(subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip())
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
  end = os.times()
  busy = end.children_user + end.children_system - start.children_user - start.children_system
  return end.elapsed - start.elapsed, busy, peak


def open_page(page, playwright):
  """Opens the page in a new Chromium.

  Returns:
    Seconds until it is loaded, until its charts are drawn, CPU time of its main thread until then,
    and the number of curves.
  """
  from tests import browser as browser_lib

  browser = playwright.chromium.launch(
    executable_path=browser_lib.CHROMIUM, args=browser_lib.ARGUMENTS
  )
  view = browser.new_page(viewport={"width": 1280, "height": 900})
  session = view.context.new_cdp_session(view)
  session.send("Performance.enable", {"timeDomain": "threadTicks"})
  view.goto(page.as_uri())
  drawn = view.wait_for_function(DRAWN).json_value()
  found = session.send("Performance.getMetrics")["metrics"]
  (busy,) = (one["value"] for one in found if one["name"] == "TaskDuration")
  loaded = view.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
  lines = view.locator("path.line").count()
  browser.close()
  return loaded / 1e3, drawn / 1e3, busy, lines


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--runs", type=int, default=10)
  parser.add_argument("--lines", type=int, default=100_000)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--dir", help="folder for the runs and the page, which are kept")
  args = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(args.dir or name).resolve()
    runs, page = folder / "runs", folder / "report.html"
    for seed in range(args.runs):
      if not (runs / f"run{seed}").exists():
        make_run(runs / f"run{seed}", seed, args.lines)
    seconds, busy, peak = write_page(runs, page)
    size = page.stat().st_size
    memory = f"at most {peak / 1e6:,.0f} MB of memory"
    print(f"written in {seconds:.0f} s, {busy:.0f} s of CPU time, {memory}")
    print(f"size: {size / 1e6:.2f} MB, {size / MOST_BYTES:.2f} x the limit")
    try:
      from playwright import sync_api
    except ImportError:
      print("not opened: playwright is not installed (pip install -e '.[browser]')")
      return
    with sync_api.sync_playwright() as playwright:
      found = [open_page(page, playwright) for _ in range(args.rounds)]
    loaded, drawn, busy, lines = zip(*found)
    print(f"opened {args.rounds} times; {lines[0]} curves drawn at once")
    print(f"loaded: median {statistics.median(loaded):.2f} s, at most {max(loaded):.2f} s")
    print(f"charts drawn: median {statistics.median(drawn):.2f} s, at most {max(drawn):.2f} s")
    print(f"CPU time of the page until then: median {statistics.median(busy):.2f} s")
    print(f"ratio of the median to the limit: {statistics.median(drawn) / MOST_SECONDS:.2f}")


if __name__ == "__main__":
  main()
