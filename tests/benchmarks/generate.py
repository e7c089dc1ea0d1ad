"""Generated tokens/s on a CPU, next to Hugging Face's `generate` with the same shapes in float32.

  python tests/benchmarks/generate.py [--shapes=32m,124m] [--rounds=3] [--cases=...] [--cpu-time]

The sides take turns, each in its own process, so that noise of the machine affects both. Each case
is timed as a whole, prompts included; its figure is the best of the rounds. Needs the extra
[bench].

  batch 1, 8   that many prompts of 64 or 512 tokens at once, 128 new tokens each
  mixed        32 requests that arrive over 2 seconds, prompts of 16 to 512 tokens, 16 to 128 new
               ones. Hugging Face's side takes up to 8 waiting requests at a time, padded on the
               left, and continues them to the longest one's end; only the tokens that were asked
               for count
  192 slots    batch 1 and 8 with prompts of 64, where jaxgpt has 192 slots in place of 1,024

With --cpu-time each side has one thread, and its CPU time counts instead of the time that passes:
the fair measure where other programs use the machine too.

No text ends before its last token. The Llama has 8 layers x 512 and a vocabulary of 8,192, the
GPT-2 its published shape.
"""

import argparse
import json
import os
import subprocess
import sys
import time

SHAPES = {
  "32m": dict(layers=8, width=512, heads=8, mlp=1408, vocab=8192),
  "124m": dict(layers=12, width=768, heads=12, mlp=3072, vocab=50257),
}
CONTEXT, NEW = 1024, 128
CPU_TIME = "--cpu-time" in sys.argv
clock = time.process_time if CPU_TIME else time.perf_counter
CASES = {
  f"batch {rows}, prompts of {length}": dict(rows=rows, length=length)
  for rows in (1, 8)
  for length in (64, 512)
}
CASES["32 mixed"] = dict(rows=8, mixed=32)
SHORT = {
  f"batch {rows}, prompts of 64, 192 slots": dict(rows=rows, length=64, context=192)
  for rows in (1, 8)
}


def requests(case, vocab):
  """(prompt, new tokens, seconds until it arrives) of each request of a case."""
  import numpy as np

  rng = np.random.default_rng(0)
  if "mixed" in case:
    count = case["mixed"]
    lengths, news = rng.integers(16, 513, count), rng.integers(16, NEW + 1, count)
    arrivals = np.sort(rng.random(count) * 2)
  else:
    count = case["rows"]
    lengths, news, arrivals = [case["length"]] * count, [NEW] * count, [0.0] * count
  return [
    (rng.integers(3, vocab, int(n)).tolist(), int(new), float(at))
    for n, new, at in zip(lengths, news, arrivals)
  ]


def wait():
  """Lets a little time of the clock pass."""
  begin = clock()
  while clock() - begin < 0.001:
    if not CPU_TIME:
      time.sleep(0.001)


def serve(make):
  """Runs the case of each line of stdin, and prints the seconds that it took."""
  print("ready", flush=True)
  for line in sys.stdin:
    case = json.loads(line)
    print(json.dumps(make(case)), flush=True)


def ours(shape):
  """jaxgpt's decoding engine."""
  from jaxgpt import config
  from jaxgpt.parallel import mesh as mesh_lib

  mesh_lib.prepare_cpu()
  import jax

  from jaxgpt.inference import load
  from jaxgpt.inference.engine import engine as engine_lib
  from jaxgpt.inference.engine.requests import Request
  from jaxgpt.inference.sampling import Sampling
  from jaxgpt.model import transformer
  from jaxgpt.run import generation
  from jaxgpt.text.tokenizers.base import ByteTokenizer

  s, engines = SHAPES[shape], {}

  def engine_of(rows, context):
    c = config.base()
    llama = dict(norm="rmsnorm", position="rotary", activation="silu", gated=True, bias=False)
    c.model.update(
      dict(
        vocab_size=s["vocab"],
        num_layers=s["layers"],
        width=s["width"],
        num_heads=s["heads"],
        mlp_width=s["mlp"],
      )
      | (llama if shape == "32m" else {})
    )
    c.data.update(dict(seq_len=context, path=""))
    c = config.resolve(c)
    mesh, parts = load.place(c)
    with jax.set_mesh(mesh):
      params = transformer.init(parts.model, jax.random.key(0))
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = s["vocab"]
    run = load.Run(
      c, parts, mesh, params, 0, tokenizer, "", generation.Generation({"eos_token_id": []})
    )
    return engine_lib.Engine(run, max_rows=rows, cache_tokens=rows * context)

  def run(case):
    key = case["rows"], case.get("context", CONTEXT)
    if key not in engines:
      engines.clear()
      engines[key] = engine_of(*key)
      engines[key].compile()
    engine, waiting = engines[key], requests(case, s["vocab"])
    begin, tokens = clock(), 0
    while waiting or engine.busy:
      while waiting and waiting[0][2] <= clock() - begin:
        prompt, new, _ = waiting.pop(0)
        # A prompt of an earlier round must not be found in the cache.
        prompt = [case["round"] + 3, *prompt[1:]]
        engine.add(Request(tuple(prompt), new, Sampling(0.0)))
      if engine.busy:
        tokens += sum(len(piece.tokens) for piece in engine.step())
      else:
        wait()
    return tokens, clock() - begin

  serve(run)


def peer(shape):
  """Hugging Face's `generate` with its scaled dot product attention."""
  import torch
  import transformers

  s = SHAPES[shape]
  torch.manual_seed(0)
  if CPU_TIME:
    torch.set_num_threads(1)
  if shape == "32m":
    c = transformers.LlamaConfig(
      vocab_size=s["vocab"],
      hidden_size=s["width"],
      intermediate_size=s["mlp"],
      num_hidden_layers=s["layers"],
      num_attention_heads=s["heads"],
      max_position_embeddings=CONTEXT,
      tie_word_embeddings=True,
      attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(c)
  else:
    c = transformers.GPT2Config(n_positions=CONTEXT, attn_implementation="sdpa")
    model = transformers.GPT2LMHeadModel(c)
  model = model.eval()

  def continued(batch):
    """Tokens that were asked for of a batch, padded on the left."""
    longest, new = max(len(p) for p, _, _ in batch), max(n for _, n, _ in batch)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p, _, _ in batch])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _, _ in batch])
    with torch.inference_mode():
      model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        eos_token_id=None,
        pad_token_id=0,
      )
    return sum(n for _, n, _ in batch)

  def run(case):
    waiting = requests(case, s["vocab"])
    begin, tokens = clock(), 0
    while waiting:
      now = clock() - begin
      batch = [r for r in waiting if r[2] <= now][: case["rows"]]
      if not batch:
        wait()
        continue
      waiting = waiting[len(batch) :]
      tokens += continued(batch)
    return tokens, clock() - begin

  serve(run)


SIDES = {"jaxgpt": ours, "transformers": peer}


def measure(shape, cases, rounds):
  """{side: {case: best tokens/s}}."""
  env = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
  cpu_time = ["--cpu-time"] if CPU_TIME else []
  if CPU_TIME:
    env["XLA_FLAGS"] = env.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
  processes = {
    side: subprocess.Popen(
      [sys.executable, __file__, f"--side={side}", f"--shapes={shape}", *cpu_time],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=env | {"JAX_PLATFORMS": "cpu"},
    )
    for side in SIDES
  }
  for side, process in processes.items():
    if process.stdout.readline().strip() != "ready":
      sys.exit(f"{side} did not start; the peer needs: pip install -e '.[bench]'")
  best = {side: {} for side in SIDES}
  for name, case in cases.items():
    for number in range(rounds):
      for side, process in processes.items():
        if side == "transformers" and "context" in case:
          continue
        process.stdin.write(json.dumps(case | {"round": number}) + "\n")
        process.stdin.flush()
        tokens, seconds = json.loads(process.stdout.readline())
        best[side][name] = max(best[side].get(name, 0), tokens / seconds)
    figures = "  ".join(
      f"{side} {found[name]:7.1f}" for side, found in best.items() if name in found
    )
    ratio = ""
    if name in best["transformers"]:
      ratio = f"  ratio {best['jaxgpt'][name] / best['transformers'][name]:.2f}"
    elif (long := name.removesuffix(", 192 slots")) in best["jaxgpt"]:
      ratio = f"  1,024 slots / 192: {best['jaxgpt'][long] / best['jaxgpt'][name]:.2f}"
    print(f"{shape:>5}  {name:<36} {figures}{ratio}", flush=True)
  for process in processes.values():
    process.stdin.close()
    process.wait()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--shapes", default=",".join(SHAPES))
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--cases", default="", help="run the cases whose names hold this")
  parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread")
  parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.side:
    return SIDES[args.side](args.shapes)
  cases = {name: case for name, case in (CASES | SHORT).items() if args.cases in name}
  for shape in args.shapes.split(","):
    measure(shape, cases, args.rounds)


if __name__ == "__main__":
  main()
