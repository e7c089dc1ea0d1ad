"""Muon against AdamW at equal tokens, each with its best learning rate.

  jaxgpt data --out=DATA --tokenizer=bytes FILES
  jaxgpt train --config=configs/muon_or_adamw.py --config.data.path=DATA --workdir=RUN    (one run)
  jaxgpt sweep --config=configs/muon_or_adamw.py --config.data.path=DATA --workdir=DIR

Size:      two layers of width 128, 300 steps of 1,024 bytes. Two optimizers, six learning rates,
           three seeds: 36 runs.
Source:    the claim of "Muon is scalable" (arXiv:2502.16982), in miniature.
"""

from jaxgpt import config
from jaxgpt.analysis.sweep import Sweep


def get_config():
  c = config.base()
  c.model.update(
    dict(
      num_layers=2,
      width=128,
      num_heads=4,
      norm="rmsnorm",
      position="rotary",
      activation="relu2",
      bias=False,
      tie_embeddings=False,
    )
  )
  c.data.seq_len = 128
  c.data.batch_size = 8
  c.optim.lr = 8e-3
  c.optim.weight_decay = 0.0
  c.schedule.warmup_steps = 20
  c.schedule.final_ratio = 0.0
  c.train.steps = 300
  c.eval.every = 0
  c.log.every = 100
  c.checkpoint.every = 1000
  return c


def get_sweep():
  return Sweep(
    grid={
      "optim.name": ("adamw", "muon"),
      "optim.lr": tuple(2**i / 1000 for i in range(6)),
    },
    seeds=(0, 1, 2),
  )
