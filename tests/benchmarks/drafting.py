"""Tokens/s of the decoding engine with drafts, next to the same engine without, in the same run.

  python tests/benchmarks/drafting.py [--folder=DIR] [--steps=150] [--rounds=2]

Trains a model of 10.6 M parameters and a draft model of 0.2 M on the docstrings of Python's
standard library, in bytes, and continues docstrings that neither has seen: 16 prompts of 48 bytes,
64 new ones each, one or eight at a time. The engines take turns. Figures are tokens per second of
CPU time, one thread, best of the rounds; compilation does not count. With --folder the models stay
there, and the next call finds them.
"""

import argparse
import os
import pathlib
import tempfile
import time

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
os.environ["JAX_PLATFORMS"] = "cpu"

from distillation import docstrings

from jaxgpt import config
from jaxgpt.inference import load
from jaxgpt.inference.engine.drafting.drafter import Drafting
from jaxgpt.inference.engine.engine import Engine
from jaxgpt.inference.engine.requests import Request
from jaxgpt.inference.sampling import Sampling
from jaxgpt.text.prepare import prepare
from jaxgpt.training import loop

PROMPT, NEW, TEXTS, CONTEXT = 48, 64, 16, 128
SIZES = {"model": (6, 384), "draft": (2, 96)}
HELD_OUT = "argparse", "socket", "typing"  # modules whose docstrings are the prompts


def trained(root: pathlib.Path, name: str, steps: int) -> pathlib.Path:
  """A run of one of the sizes."""
  folder = root / name
  if folder.exists():
    return folder
  layers, width = SIZES[name]
  c = config.base()
  llama = dict(norm="rmsnorm", position="rotary", activation="silu", gated=True, bias=False)
  c.model.update(dict(num_layers=layers, width=width, num_heads=width // 48) | llama)
  c.data.update(dict(path=str(root / "data"), seq_len=CONTEXT, batch_size=8))
  c.optim.lr, c.schedule.warmup_steps, c.train.steps = 2e-3, 20, steps
  c.eval.every, c.checkpoint.every, c.log.every = 0, steps, 25
  loop.train(c, folder, {})
  return folder


def requests(root: pathlib.Path, temperature: float, number: int) -> list[Request]:
  """Beginnings of docstrings, other ones in each round: none is found in the cache."""
  text = "\n".join((root / "held_out" / f"{name}.txt").read_text() for name in HELD_OUT)
  room = len(text) // TEXTS - PROMPT
  starts = [i * (len(text) // TEXTS) + 31 * number % room for i in range(TEXTS)]
  return [
    Request(tuple(text[at : at + PROMPT].encode())[:PROMPT], NEW, Sampling(temperature), seed=at)
    for at in starts
  ]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--folder", help="where the models are kept")
  parser.add_argument("--steps", type=int, default=150)
  parser.add_argument("--rounds", type=int, default=2)
  args = parser.parse_args()
  root = pathlib.Path(args.folder or tempfile.mkdtemp())
  if not (root / "data").exists():
    texts, held_out = docstrings(root / "text"), root / "held_out"
    held_out.mkdir(exist_ok=True)
    for name in HELD_OUT:
      (texts / f"{name}.txt").rename(held_out / f"{name}.txt")
    prepare.prepare([texts], root / "data", tokenizer="bytes", validation=0.1, test=0.0)
  runs = {
    name: load.load(
      trained(root, name, args.steps * (4 if name == "draft" else 1)), None, "generate"
    )
    for name in SIZES
  }
  kinds = {"no drafts": None, "ngram, 4": Drafting(4)}
  kinds |= {f"model, {k}": Drafting(k, runs["draft"]) for k in (2, 4, 6)}
  for rows in (1, 8):
    engines = {
      name: Engine(runs["model"], max_rows=rows, drafting=kind) for name, kind in kinds.items()
    }
    for engine in engines.values():
      engine.compile()
    for temperature in (0.0, 0.8):
      best, shares = dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, "")
      for number in range(args.rounds):
        for name, engine in engines.items():
          asked = requests(root, temperature, 2 * number + (temperature > 0))
          before, begin = engine.stats(), time.process_time()
          engine.texts(asked)
          seconds, after = time.process_time() - begin, engine.stats()
          best[name] = max(best[name], (after.decoded - before.decoded) / seconds)
          if drafted := after.drafted - before.drafted:
            shares[name] = f", {(after.accepted - before.accepted) / drafted:.0%} accepted"
      for name, rate in best.items():
        ratio = rate / best["no drafts"]
        print(
          f"{rows} at a time, temperature {temperature}, {name:<10} {rate:7.1f} tokens/s, "
          f"ratio {ratio:.2f}{shares[name]}",
          flush=True,
        )


if __name__ == "__main__":
  main()
