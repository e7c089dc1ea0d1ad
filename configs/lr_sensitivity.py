"""Sensitivity to the learning rate at four widths, with and without QK-norm and z-loss.

  jaxgpt data --out=DATA --tokenizer=bytes FILES
  jaxgpt train --config=configs/lr_sensitivity.py --config.data.path=DATA --workdir=RUN    (one run)
  jaxgpt sweep --config=configs/lr_sensitivity.py --config.data.path=DATA --workdir=DIR

Size:      two layers of width 16 to 128 with four heads, 150 steps of 1,024 bytes. Three variants,
           four widths, five learning rates, two seeds: 120 runs.
Source:    figures 1 and 3 of arXiv:2309.14322, in miniature.
"""

from jaxgpt import config
from jaxgpt.analysis.sweep import Sweep


def get_config():
  c = config.base()
  c.model.update(
    dict(
      num_layers=2,
      width=32,
      num_heads=4,
      norm="layernorm",
      position="rotary",
      activation="gelu",
      bias=False,
      tie_embeddings=False,
    )
  )
  c.data.seq_len = 128
  c.data.batch_size = 8
  c.optim.lr = 1e-2
  c.optim.weight_decay = 0.0
  c.schedule.warmup_steps = 15
  c.schedule.final_ratio = 0.0
  c.train.steps = 150
  c.eval.every = 0
  c.log.every = 50
  c.checkpoint.every = 1000
  return c


def get_sweep():
  variant = ("model.qk_norm", "objective.z_loss")
  return Sweep(
    grid={
      variant: (("none", 1e-4), ("head", 1e-4), ("head", 0.0)),
      "model.width": (16, 32, 64, 128),
      "optim.lr": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    },
    seeds=(0, 1),
  )
