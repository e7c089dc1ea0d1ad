"""Learning-rate transfer across widths: muP against the standard parametrization.

  jaxgpt data --out=DATA --tokenizer=bytes FILES
  jaxgpt train --config=configs/mup_transfer.py --config.data.path=DATA --workdir=RUN    (one run)
  jaxgpt sweep --config=configs/mup_transfer.py --config.data.path=DATA --workdir=DIR

Size:      two layers of width 32 and 128, with heads of 16; 120 steps of 512 bytes. Two
           parametrizations, two widths, six learning rates, two seeds: 48 runs.
"""

from jaxgpt import config
from jaxgpt.analysis.sweep import Sweep


def get_config():
  c = config.base()
  c.model.update(
    dict(
      num_layers=2,
      width=32,
      num_heads=2,
      norm="rmsnorm",
      position="rotary",
      activation="relu2",
      bias=False,
    )
  )
  c.data.seq_len = 64
  c.data.batch_size = 8
  c.optim.lr = 8e-3
  c.schedule.warmup_steps = 10
  c.train.steps = 120
  c.eval.every = 0
  c.log.every = 40
  c.checkpoint.every = 1000
  return c


def get_sweep():
  widths = ("model.width", "model.num_heads")
  return Sweep(
    points=(
      {"model.mup.base_width": 0},
      {"model.mup.base_width": 32, "model.mup.base_head_dim": 16},
    ),
    grid={
      widths: ((32, 2), (128, 8)),
      "optim.lr": tuple(2**i / 1000 for i in range(1, 7)),
    },
    seeds=(0, 1),
  )
