"""Training tokens/s on a CPU, next to Hugging Face's GPT-2 in eager PyTorch with the same shapes.

  python tests/benchmarks/train_cpu.py [--rounds=8]

6 layers, width 384, 6 heads, 8 rows of 256 tokens, vocabulary 512, float32, AdamW, gradient
clipping. The two take turns, each in its own process, so that noise of the machine affects both.
Prints the medians over all steps and their ratio. Needs the extra [bench].
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

LAYERS, WIDTH, HEADS, T, B, V = 6, 384, 6, 256, 8, 512
WARMUP, STEPS = 2, 4  # steps per round: not timed, timed


def rounds(step):
  """Runs a round of steps for each line of stdin, and prints their seconds."""
  for _ in range(WARMUP):
    step()
  print("ready", flush=True)
  for _ in sys.stdin:
    seconds = []
    for _ in range(STEPS):
      start = time.perf_counter()
      step()
      seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds), flush=True)


def ours():
  """jaxgpt's train step, compiled as the loop compiles it."""
  from jaxgpt import config
  from jaxgpt.parallel import mesh as mesh_lib
  from jaxgpt.training import batches as batches_lib
  from jaxgpt.training import build as build_lib
  from jaxgpt.training import train_step

  mesh_lib.prepare_cpu()
  import jax
  import numpy as np

  c = config.base()
  c.model.update(
    dict(vocab_size=V, num_layers=LAYERS, width=WIDTH, num_heads=HEADS, scan_unroll=LAYERS)
  )
  c.data.update(dict(seq_len=T, batch_size=B))
  c = config.resolve(c)
  mesh = mesh_lib.make(c.mesh)
  parts = build_lib.build(c, mesh)
  ids = np.random.default_rng(0).integers(0, V, (B, T + 1), dtype=np.int32)
  ones = np.ones((B, T), np.int32)
  batch = {
    "tokens": ids[:, :-1],
    "targets": ids[:, 1:],
    "loss_weights": ones.astype(np.float32),
    "segment_ids": ones,
    "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
  }
  shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
  compiled = train_step.compile(
    train_step.make(parts.objective, parts.tx, parts.schedule, c), parts.state, shapes, mesh
  )
  with jax.set_mesh(mesh):
    state = train_step.first_state(parts.model, parts.tx, 0, parts.state)
  batch = batches_lib.to_devices(batch, mesh)

  def step():
    nonlocal state
    state, metrics = compiled(state, batch)
    return float(metrics["loss"])

  rounds(step)


def peer(attention):
  """Hugging Face's GPT2LMHeadModel in training mode."""
  import torch
  from transformers import GPT2Config, GPT2LMHeadModel

  torch.manual_seed(0)
  model = GPT2LMHeadModel(
    GPT2Config(
      vocab_size=V,
      n_positions=T,
      n_embd=WIDTH,
      n_layer=LAYERS,
      n_head=HEADS,
      resid_pdrop=0,
      embd_pdrop=0,
      attn_pdrop=0,
      attn_implementation=attention,
    )
  ).train()
  opt = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
  ids = torch.randint(0, V, (B, T))

  def step():
    opt.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    return loss.item()

  rounds(step)


SIDES = {
  "jaxgpt": ours,
  "transformers sdpa": lambda: peer("sdpa"),
  "transformers eager": lambda: peer("eager"),
}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=8)
  parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.side:
    return SIDES[args.side]()
  env = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
  processes = {}
  for side in SIDES:
    processes[side] = subprocess.Popen(
      [sys.executable, __file__, f"--side={side}"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=env | {"JAX_PLATFORMS": "cpu"},
    )
    if processes[side].stdout.readline().strip() != "ready":
      sys.exit(f"{side} did not start; the peer needs: pip install -e '.[bench]'")
  seconds = {side: [] for side in SIDES}
  for _ in range(args.rounds):
    for side, process in processes.items():
      process.stdin.write("go\n")
      process.stdin.flush()
      seconds[side] += json.loads(process.stdout.readline())
  for process in processes.values():
    process.stdin.close()
    process.wait()
  rate = {side: B * T / statistics.median(times) for side, times in seconds.items()}
  for side, value in rate.items():
    print(f"{side:<20} {value:8,.0f} tokens/s  (best {B * T / min(seconds[side]):,.0f})")
  best = max(value for side, value in rate.items() if side != "jaxgpt")
  print(f"ratio to the faster peer: {rate['jaxgpt'] / best:.2f}")


if __name__ == "__main__":
  main()
