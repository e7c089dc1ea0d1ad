"""Seconds for which a save holds up training, and the time that digests of arrays add.

  python tests/benchmarks/checkpoint_save.py [--params=100] [--rounds=5] [--dir=DIR]

A model of about 100 million parameters and AdamW's moments, float32. Each round saves the state in
a new step, and times until `Checkpoints.save` returns (training goes on then) and until the
checkpoint is complete (a synchronous save). Digests are timed alone. A save computes them in the
background. Prints the medians, the share of a save that blocks, and the share of a run's time that
digests take at the default `checkpoint.every`, with a step of this model.
"""

import argparse
import os
import pathlib
import shutil
import statistics
import tempfile
import time


def _build(millions):
  """(config, mesh, parts) of a model of about so many million parameters."""
  from jaxgpt import config
  from jaxgpt.parallel import mesh as mesh_lib
  from jaxgpt.training import build as build_lib

  c = config.base()
  width = 768
  layers = max(1, round((millions * 1e6 - 2 * 8192 * width) / (12 * width**2)))
  c.model.update(dict(vocab_size=8192, num_layers=layers, width=width, num_heads=12))
  c.data.update(dict(seq_len=128, batch_size=4))
  c = config.resolve(c)
  mesh = mesh_lib.make(c.mesh)
  return c, mesh, build_lib.build(c, mesh)


def _step_seconds(c, mesh, parts, state):
  """Seconds of a training step, and the state after it."""
  import jax
  import numpy as np

  from jaxgpt.training import batches as batches_lib
  from jaxgpt.training import train_step

  rows, length = c.data.batch_size, c.data.seq_len
  ids = np.random.default_rng(0).integers(0, c.model.vocab_size, (rows, length + 1), dtype=np.int32)
  ones = np.ones((rows, length), np.int32)
  batch = {
    "tokens": ids[:, :-1],
    "targets": ids[:, 1:],
    "loss_weights": ones.astype(np.float32),
    "segment_ids": ones,
    "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
  }
  shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
  step_fn = train_step.make(parts.objective, parts.tx, parts.schedule, c)
  compiled = train_step.compile(step_fn, parts.state, shapes, mesh, c.mesh.compiler_options)
  seconds = []
  for _ in range(3):
    start = time.perf_counter()
    state, _ = compiled(state, batches_lib.to_devices(batch, mesh))
    jax.block_until_ready(state)
    seconds.append(time.perf_counter() - start)
  return min(seconds[1:]), state


def _saves(state, folder, rounds):
  """[(seconds until save returns, seconds until it is complete)], the first one left out."""
  from jaxgpt.run import checkpoints as checkpoints_lib

  checkpoints = checkpoints_lib.Checkpoints(folder, keep=1)
  found = []
  for n in range(rounds + 1):
    start = time.perf_counter()
    checkpoints.save(state | {"step": n, "nonfinite_step": -1})
    blocked = time.perf_counter() - start
    checkpoints.wait()
    found.append((blocked, time.perf_counter() - start))
  checkpoints.close()
  return found[1:]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--params", type=float, default=100, help="millions of parameters")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--dir", default=None, help="where to save")
  args = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  from jaxgpt.parallel import mesh as mesh_lib

  mesh_lib.prepare_cpu()
  import jax

  from jaxgpt.run import digests
  from jaxgpt.training import train_step

  c, mesh, parts = _build(args.params)
  folder = pathlib.Path(tempfile.mkdtemp(dir=args.dir))
  try:
    with jax.set_mesh(mesh):
      state = train_step.first_state(parts.model, parts.tx, 0, parts.state)
      items = {name: state[name] for name in ("params", "opt")}
      leaves = jax.tree.leaves(state["params"])
      size = sum(x.nbytes for x in jax.tree.leaves(items))
      print(f"{sum(x.size for x in leaves) / 1e6:.0f}M parameters, {size / 1e9:.2f} GB", flush=True)
      times = []
      for _ in range(args.rounds):
        start = time.perf_counter()
        digests.sums(digests.on_host(items))
        times.append(time.perf_counter() - start)
      saves = _saves(state, folder / "saves", args.rounds)
      step, _ = _step_seconds(c, mesh, parts, state)
  finally:
    shutil.rmtree(folder)
  digest, blocked = statistics.median(times), statistics.median(b for b, _ in saves)
  whole = statistics.median(w for _, w in saves)
  between = c.checkpoint.every * step
  print(f"save returns after {blocked:.2f} s, is complete after {whole:.2f} s")
  print(f"ratio of the two: {blocked / whole:.3f}")
  print(f"digests {digest:.2f} s of one core, in the background")
  print(
    f"step of {c.data.batch_size} x {c.data.seq_len} tokens {step:.2f} s, "
    f"checkpoint.every={c.checkpoint.every}"
  )
  print(f"ratio of digests to the time between saves: {digest / between:.5f}")


if __name__ == "__main__":
  main()
