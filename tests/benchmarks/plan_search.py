"""`plan --search` against ten plans that an expert would write: Llama-3-8B, rows of 8,192 tokens.

  python tests/benchmarks/plan_search.py --cache=FILE [--minutes=N] [v5e-256 v6e-64]

Needs jaxgpt[tpu], but no TPU. Compiles the ten plans and the search's choice, each 2 to 5 minutes
on one core. FILE keeps the results, so that the next start continues after an interruption or
after the given minutes (delete it when the model or the compiler changes). Prints both tables,
the ratio of estimated tokens/s per chip (at least 1 is expected) and the time of the search's own
compilations.
"""

import hashlib
import json
import math
import pathlib
import sys
import time

from jaxgpt.plan import environment

environment.prepare()

from jaxgpt import config
from jaxgpt.errors import UserError
from jaxgpt.plan import lower, topology
from jaxgpt.plan.search import candidates, search

CONFIG = "configs/llama3_8b.py"
ALL = "save:q,k,v,attention,gate,up"
# (mesh axes other than data=1, rows per data shard, microbatches, remat)
HAND_MADE = {
  "v5e-256": [
    (dict(fsdp=256), 1, 1, "full"),
    (dict(fsdp=256), 1, 1, "save_qkv"),
    (dict(fsdp=256), 1, 1, "save_attention"),
    (dict(fsdp=256), 2, 1, "full"),
    (dict(fsdp=256), 1, 2, "save_attention"),
    (dict(fsdp=128, tensor=2), 1, 1, ALL),
    (dict(fsdp=64, tensor=4), 2, 1, "save_attention"),
    (dict(fsdp=128, seq=2), 1, 1, "save_attention"),
    (dict(fsdp=64, seq=4), 1, 1, ALL),
    (dict(fsdp=64, seq=4), 2, 1, "save_attention"),
  ],
  "v6e-64": [
    (dict(fsdp=64), 1, 1, "full"),
    (dict(fsdp=64), 1, 1, "save_attention"),
    (dict(fsdp=64), 1, 1, ALL),
    (dict(fsdp=64), 2, 1, "full"),
    (dict(fsdp=64), 2, 1, "save_attention"),
    (dict(fsdp=64), 1, 2, "save_attention"),
    (dict(fsdp=32, tensor=2), 1, 1, "dots"),
    (dict(fsdp=32, tensor=2), 2, 1, ALL),
    (dict(fsdp=16, tensor=4), 4, 1, "save_attention"),
    (dict(fsdp=32, seq=2), 1, 1, ALL),
  ],
}


class Later(Exception):
  """The given minutes are over."""


class Cache:
  """Results of compilations, kept in a file; see `search.compiled`."""

  def __init__(self, path, minutes):
    self._path, self._until = pathlib.Path(path), time.monotonic() + 60 * minutes
    self._known = json.loads(self._path.read_text()) if self._path.exists() else {}
    self.seconds = 0.0  # duration of the requested compilations

  def compiled(self, candidate, where):
    text = json.dumps([where.name, candidate.c.to_json()])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    if key not in self._known:
      if time.monotonic() > self._until:
        raise Later
      began = time.monotonic()
      result = search.compiled(candidate, where)
      if isinstance(result.error, UserError):
        return result
      self._known[key] = {
        "topology": where.name,
        "changes": candidate.changes,
        "figures": result.figures,
        "error": result.error and [result.error.needed, result.error.limit],
        "seconds": time.monotonic() - began,
      }
      self._path.write_text(json.dumps(self._known, indent=1))
    entry = self._known[key]
    self.seconds += entry["seconds"]
    error = entry["error"] and lower.OutOfMemory(*entry["error"])
    return search.Result(candidate, entry["figures"], error)


def changes_of(axes, rows, accumulate, remat, num_devices):
  """Returns the changes to the config for a plan of the table."""
  sizes = dict(data=1, fsdp=1, seq=1, tensor=1, expert=1, stage=1) | axes
  assert math.prod(sizes.values()) == num_devices
  changes = {f"mesh.{axis}": size for axis, size in sizes.items()}
  batch = rows * accumulate * sizes["data"] * sizes["fsdp"]
  return changes | {"model.remat": remat, "data.batch_size": batch, "optim.accumulate": accumulate}


def compare(name, cache):
  """Compiles the expert's plans and the search's choice for a topology, and prints them."""
  c, where = lower.resolve(config.load(CONFIG)[0]), topology.parse(name)
  print(f"\n{name}: the search", flush=True)
  cache.seconds, began = 0.0, time.monotonic()
  found = search.search(c, where, run=cache.compiled, say=lambda line: print(line, flush=True))
  print("\n".join(search.table(found)), flush=True)
  took, now = cache.seconds, time.monotonic() - began
  print(f"it compiled for {took / 60:.1f} minutes, {now / 60:.1f} of them now", flush=True)
  print(f"\n{name}: made by hand", flush=True)
  by_hand = []
  for row in HAND_MADE[name]:
    changes = changes_of(*row, where.num_devices)
    one = candidates.Candidate(candidates.changed(c, changes), changes, 0.0, 0.0)
    by_hand.append(cache.compiled(one, where))
    print(f"  {search.describe(changes)}: {search.verdict(by_hand[-1])}", flush=True)
  rate = lambda results: max(
    (r.figures["tokens_per_second_per_chip"] for r in results if r.fits), default=math.nan
  )
  print(
    f"\n{name}: {rate(found):,.0f} tokens/s a chip by the search, {rate(by_hand):,.0f} by the best "
    f"of ten hands, ratio {rate(found) / rate(by_hand):.3f}",
    flush=True,
  )


def main():
  given = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:] if a.startswith("--"))
  names = [a for a in sys.argv[1:] if not a.startswith("--")] or list(HAND_MADE)
  if "cache" not in given:
    sys.exit(__doc__)
  cache = Cache(given["cache"], float(given.get("minutes", math.inf)))
  try:
    for name in names:
      compare(name, cache)
  except Later:
    print("to go on, start again", flush=True)
    sys.exit(3)


if __name__ == "__main__":
  main()
