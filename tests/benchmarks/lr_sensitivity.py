"""Sensitivity to the learning rate, from the table of a sweep (arXiv:2309.14322, section 2.2).

  jaxgpt sweep --config=configs/lr_sensitivity.py --config.data.path=DATA --workdir=DIR
  python tests/benchmarks/lr_sensitivity.py DIR [--vocabulary=264]

For each setting of the other keys and each seed:

  sensitivity = mean over rates of min(loss, log(vocabulary)) - least loss over rates

in nats. log(vocabulary) is the loss of a uniform prediction; a run that diverged has it. The table
shows the median over the seeds, and the smallest and largest. For each variant, that is for each
setting of the keys besides rate and width, DIR gets a plot of the loss against the rate, with a
line for each width.
"""

import argparse
import collections
import json
import math
import pathlib
import statistics
import sys

from jaxgpt.analysis.sweep import plot, state
from jaxgpt.analysis.sweep.table import Row, Table

RATE, WIDTH = "optim.lr", "model.width"


def capped(row, start):
  """A row of the table, whose losses are at most `start`."""
  values = {
    seed: start if loss is None else min(loss, start) for seed, loss in row["values"].items()
  }
  of = values.values()
  return Row(**row | dict(values=values, median=statistics.median(of), low=min(of), high=max(of)))


def sensitivities(rows):
  """{setting of the other keys, as text: (sensitivity of each seed, best rate of each seed)}."""
  losses = collections.defaultdict(dict)  # {(setting, seed): {rate: loss}}
  for row in rows:
    rest = ", ".join(f"{key}={value}" for key, value in row.setting.items() if key != RATE)
    for seed, loss in row.values.items():
      losses[rest, seed][row.setting[RATE]] = loss
  rates = {rate for of_seed in losses.values() for rate in of_seed}
  found = collections.defaultdict(lambda: ([], []))
  for (rest, _), of_rate in sorted(losses.items()):
    if missing := rates - of_rate.keys():
      sys.exit(f"{rest}: no loss at the rates {sorted(missing)}; let the sweep train first")
    found[rest][0].append(statistics.mean(of_rate.values()) - min(of_rate.values()))
    found[rest][1].append(min(of_rate, key=of_rate.__getitem__))
  return found


def variants(rows):
  """{values of the keys besides rate and width: their rows}."""
  found = collections.defaultdict(list)
  for row in rows:
    found[tuple(v for key, v in row.setting.items() if key not in (RATE, WIDTH))].append(row)
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--vocabulary", type=int, default=264)
  args = parser.parse_args()
  read = json.loads((args.folder / "table.json").read_text())
  if not read.pop("complete"):
    sys.exit(f"{args.folder}: not all runs are trained; repeat the command of the sweep")
  if failed := [name for name, f in read["failures"].items() if f["kind"] != state.DIVERGED]:
    sys.exit(f"{args.folder}: {', '.join(failed)} failed; see the table for the reasons")
  rows = [capped(row, math.log(args.vocabulary)) for row in read["rows"]]
  print("| setting | sensitivity | of the seeds | best rate of each seed |\n|---|---|---|---|")
  for rest, (values, best) in sensitivities(rows).items():
    ends = f"{min(values):.3f} to {max(values):.3f}"
    rates = ", ".join(f"{rate:g}" for rate in best)
    print(f"| {rest} | {statistics.median(values):.3f} | {ends} | {rates} |")
  for values, some in variants(rows).items():
    names = {key: name for key, name in read["names"].items() if key in (RATE, WIDTH)}
    path = args.folder / f"plot-{'-'.join(map(str, values))}.svg"
    path.write_text(plot.svg(Table(**read | dict(rows=some, names=names)), RATE))
    print(f"wrote {path}")


if __name__ == "__main__":
  main()
