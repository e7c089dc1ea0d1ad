"""Sensitivity to the learning rate, from the table of a sweep (arXiv:2309.14322, section 2.2).

  jaxgpt sweep --config=configs/lr_sensitivity.py --config.data.path=DATA --workdir=DIR
  python tests/benchmarks/lr_sensitivity.py DIR [VOCABULARY]

For each setting of the other keys and each seed:

  sensitivity = mean over rates of min(loss, log(vocabulary)) - least loss over rates

in nats. log(vocabulary) is the loss of a uniform prediction; a run that diverged has it. The table
shows the median over the seeds, and the smallest and largest.
"""

import collections
import json
import math
import pathlib
import statistics
import sys

RATE = "optim.lr"


def sensitivities(table, start):
  """{setting of the other keys, as text: (sensitivity of each seed, best rate of each seed)}."""
  losses = collections.defaultdict(dict)  # {(setting, seed): {rate: loss}}
  for row in table["rows"]:
    rest = ", ".join(f"{key}={value}" for key, value in row["setting"].items() if key != RATE)
    for seed, loss in row["values"].items():
      finite = loss is not None and math.isfinite(float(loss))
      losses[rest, seed][row["setting"][RATE]] = min(float(loss), start) if finite else start
  rates = {rate for of_seed in losses.values() for rate in of_seed}
  found = collections.defaultdict(lambda: ([], []))
  for (rest, seed), of_rate in losses.items():
    if missing := rates - of_rate.keys():
      sys.exit(f"{rest}, seed {seed}: no loss at {sorted(missing)}; let the sweep train first")
    found[rest][0].append(statistics.mean(of_rate.values()) - min(of_rate.values()))
    found[rest][1].append(min(of_rate, key=of_rate.__getitem__))
  return found


def main():
  folder, vocabulary = pathlib.Path(sys.argv[1]), int((*sys.argv[2:], 264)[0])
  table = json.loads((folder / "table.json").read_text())
  print("| setting | sensitivity | of the seeds | best rate of each seed |\n|---|---|---|---|")
  for rest, (values, best) in sensitivities(table, math.log(vocabulary)).items():
    ends = f"{min(values):.3f} to {max(values):.3f}"
    rates = ", ".join(f"{rate:g}" for rate in best)
    print(f"| {rest} | {statistics.median(values):.3f} | {ends} | {rates} |")


if __name__ == "__main__":
  main()
