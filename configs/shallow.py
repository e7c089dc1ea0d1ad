"""Half of the demo's layers, distilled from all of them, against such a model trained alone.

  jaxgpt demo --dir=runs/demo
  jaxgpt prune --workdir=runs/demo/run --to=runs/shallow --method=layers --remove=2 --rows=64
  jaxgpt sweep --config=configs/shallow.py --workdir=DIR

Size:      the demo with two layers and 150 steps. Two settings, three seeds: 6 runs.
"""

from jaxgpt.analysis.sweep import Sweep


def get_sweep():
  shallow = {
    "init_from": "runs/shallow",
    "objective.name": "distillation",
    "objective.teacher": "runs/demo/run",
    "optim.lr": 3e-3,
    "optim.adam_lr": 2e-3,
  }
  return Sweep(
    base="demo.py",
    fixed={"model.num_layers": 2, "model.scan_unroll": 2, "train.steps": 150},
    points=({}, shallow),
    seeds=(0, 1, 2),
    metric="bits_per_byte",
  )
