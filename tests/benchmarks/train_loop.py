"""Tokens/s of `jaxgpt train`, next to a bare loop over the same compiled step.

  python tests/benchmarks/train_loop.py [--rounds=6] [--width=256]

4 layers, 8 rows of 256 tokens of prepared data, float32. The two take turns in one process, so that
noise of the machine affects both. The bare loop has one batch on the device and reads no metric.
That of `train` makes its batches, reports metrics, and looks for signals. Steps that wait for a
save or an evaluation are in neither. Prints the medians and their ratio.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

CHUNK, CHUNKS = 5, 4  # steps of a log line, and log lines of a round


def _config(folder, width, steps):
  from jaxgpt import config

  c = config.base()
  c.model.update(dict(num_layers=4, width=width, num_heads=width // 64))
  c.data.update(dict(path=str(folder / "data"), seq_len=256, batch_size=8))
  c.schedule.warmup_steps = 2
  c.train.steps = steps
  c.log.every = CHUNK
  c.eval.every = 0
  c.checkpoint.every = 10 * steps
  return c


def first_step(c):
  """(config, mesh, compiled step, state, batch) of a config before its first step."""
  import jax

  from jaxgpt.parallel import mesh as mesh_lib
  from jaxgpt.training import batches as batches_lib
  from jaxgpt.training import build as build_lib
  from jaxgpt.training import train_step

  _, c = batches_lib.load_tokenizer_and_config(c)
  mesh = mesh_lib.make(c.mesh)
  parts = build_lib.build(c, mesh)
  data = batches_lib.training_data(c)
  shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in data.batch(0).items()}
  step_fn = train_step.make(parts.objective, parts.tx, parts.schedule, c)
  compiled = train_step.compile(step_fn, parts.state, shapes, mesh, c.mesh.compiler_options)
  with jax.set_mesh(mesh):
    state = train_step.first_state(parts.model, parts.tx, 0, parts.state)
  return c, mesh, compiled, state, batches_lib.to_devices(data.batch(0), mesh)


def _bare(c):
  """A function that runs a chunk of bare steps and returns their seconds per step."""
  import jax

  _, _, compiled, state, batch = first_step(c)

  def chunk():
    nonlocal state
    start = time.perf_counter()
    for _ in range(CHUNK):
      state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    return (time.perf_counter() - start) / CHUNK

  return chunk


def _loop(c, folder, until):
  """Trains until a step: seconds per step and input wait of each log line but the first."""
  from jaxgpt import config
  from jaxgpt.training import loop

  loop.train(c, folder / "run", config.flatten(c), until=until)
  lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
  ours = [r for r in lines if r["kind"] == "train" and r["step"] > until - CHUNK * CHUNKS]
  return [r["step_time"] for r in ours[1:]], [r["input_wait"] for r in ours[1:]]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=6)
  parser.add_argument("--width", type=int, default=256)
  args = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  from jaxgpt.parallel import mesh

  mesh.prepare_cpu()
  import jax

  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    (folder / "texts").mkdir()
    for i in range(200):
      (folder / "texts" / f"{i}.txt").write_text(" ".join(str(i * j) for j in range(600)))
    words = [sys.executable, "-m", "jaxgpt", "data", f"{folder}/texts", f"--out={folder}/data"]
    subprocess.run([*words, "--tokenizer=bytes"], check=True, capture_output=True)
    c = _config(folder, args.width, (args.rounds + 1) * CHUNK * CHUNKS)
    chunk = _bare(c)
    chunk()
    bare, trained, waits, ratios = [], [], [], []
    for round_ in range(args.rounds):
      before = [chunk() for _ in range(2)]
      steps, waited = _loop(c, folder, (round_ + 1) * CHUNK * CHUNKS)
      around = before + [chunk() for _ in range(2)]
      bare, trained, waits = bare + around, trained + steps, waits + waited
      ratios.append(statistics.median(around) / statistics.median(steps))
  tokens = c.data.batch_size * c.data.seq_len
  print(f"bare loop      {tokens / statistics.median(bare):10,.0f} tokens/s")
  print(f"jaxgpt train   {tokens / statistics.median(trained):10,.0f} tokens/s")
  print(f"input wait     {statistics.median(waits):10.2%} of the time of steps")
  print(f"ratio of the medians: {statistics.median(bare) / statistics.median(trained):.3f}")
  shown = " ".join(f"{r:.3f}" for r in ratios)
  print(f"ratio of each round: {shown}; median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
  main()
