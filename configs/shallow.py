"""Half of the demo's layers, distilled from all of them, against such a model trained alone.

  jaxgpt demo --dir=runs/demo
  jaxgpt prune --workdir=runs/demo/run --to=runs/shallow --method=layers --remove=2 --rows=64
  jaxgpt train --config=configs/shallow.py --workdir=RUN    (alone)
  jaxgpt sweep --config=configs/shallow.py --workdir=DIR

Size:      two layers of width 256, 150 steps of 2,048 tokens. Two settings, three seeds: 6 runs.
"""

from jaxgpt import config
from jaxgpt.analysis.sweep import Sweep


def get_config():
  c = config.base()
  c.model.update(
    dict(
      num_layers=2,
      width=256,
      num_heads=4,
      norm="rmsnorm",
      position="rotary",
      activation="relu2",
      bias=False,
      scan_unroll=2,
    )
  )
  c.data.path = "runs/demo/data"
  c.data.seq_len = 256
  c.data.batch_size = 8
  c.train.steps = 150
  c.optim.name = "muon"
  c.optim.lr = 7e-3
  c.optim.adam_lr = 5e-3
  c.schedule.name = "linear"
  c.schedule.warmup_steps = 20
  c.schedule.final_ratio = 0.0
  c.eval.every = 0
  c.checkpoint.every = 150
  return c


def get_sweep():
  shallow = {
    "init_from": "runs/shallow",
    "objective.name": "distillation",
    "objective.teacher": "runs/demo/run",
    "optim.lr": 3e-3,
    "optim.adam_lr": 2e-3,
  }
  return Sweep(points=({}, shallow), seeds=(0, 1, 2), metric="bits_per_byte")
