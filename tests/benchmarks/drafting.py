"""Tokens/s of the decoding engine with drafts, next to the same engine without, in the same run.

  python tests/benchmarks/drafting.py --workdir=RUN --draft=RUN
      [--rows=1,8] [--tokens=2,4] [--rounds=2]

Continues docstrings of Python's standard library: 16 prompts of 48 tokens, 48 new ones each, --rows
at a time, greedily and at temperature 0.8, with drafts of the draft model and of n-grams. The
engines take turns. Figures are tokens per second of CPU time, one thread, best of the rounds;
compilation does not count.
"""

import argparse
import os
import pathlib
import tempfile
import time

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
os.environ["JAX_PLATFORMS"] = "cpu"

from distillation import docstrings

from jaxgpt.inference import load
from jaxgpt.inference.engine.drafting.drafter import Drafting
from jaxgpt.inference.engine.engine import Engine
from jaxgpt.inference.engine.requests import Request
from jaxgpt.inference.sampling import Sampling

PROMPT, NEW, TEXTS = 48, 48, 16


def requests(ids: list[int], temperature: float, number: int) -> list[Request]:
  """Beginnings of texts, other ones in each round: none is found in the cache."""
  starts = [(TEXTS * number + i) * PROMPT for i in range(TEXTS)]
  return [
    Request(tuple(ids[at : at + PROMPT]), NEW, Sampling(temperature), seed=at) for at in starts
  ]


def measure(run: load.Run, draft: load.Run, rows: int, tokens: list[int], rounds: int) -> None:
  """Prints the figures of a number of texts at a time."""
  kinds = {"no drafts": None, f"ngram, {tokens[-1]}": Drafting(tokens[-1])}
  kinds |= {f"model, {k}": Drafting(k, draft) for k in tokens}
  engines = {name: Engine(run, max_rows=rows, drafting=kind) for name, kind in kinds.items()}
  for engine in engines.values():
    engine.compile()
  with tempfile.TemporaryDirectory() as folder:
    files = sorted(docstrings(pathlib.Path(folder)).glob("*.txt"))
    text = "\n".join(file.read_text() for file in files)[: 40 * PROMPT * TEXTS * rounds]
  ids = run.tokenizer.encode(text)
  for i, temperature in enumerate((0.0, 0.8)):
    best, shares = dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, "")
    for number in range(rounds):
      for name, engine in engines.items():
        asked = requests(ids, temperature, rounds * i + number)
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


def main() -> None:
  numbers = lambda text: [int(word) for word in text.split(",")]
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--draft", required=True)
  parser.add_argument("--rows", type=numbers, default=[1, 8])
  parser.add_argument("--tokens", type=numbers, default=[2, 4])
  parser.add_argument("--rounds", type=int, default=2)
  args = parser.parse_args()
  run, draft = (load.load(folder, None, "generate") for folder in (args.workdir, args.draft))
  for rows in args.rows:
    measure(run, draft, rows, args.tokens, args.rounds)


if __name__ == "__main__":
  main()
