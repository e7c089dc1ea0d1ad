"""A sweep of the learning rate of a tiny model of bytes, with successive halving or a search.

  jaxgpt data --out=DATA --tokenizer=bytes FILES
  jaxgpt sweep --config=configs/lr_sweep.py --config.data.path=DATA --workdir=DIR
  jaxgpt sweep --config=configs/lr_sweep.py:search --config.data.path=DATA --workdir=DIR
  jaxgpt train --config=configs/lr_sweep.py --config.data.path=DATA --workdir=RUN    (one run)

Size:      33,184 parameters, 60 steps of 512 bytes. Four learning rates with three seeds: 12 runs,
           of which six end after 20 steps. The search has 12 runs of learning rate and b2.
Hardware:  2 CPU cores, about 2 minutes.
"""

from jaxgpt import config
from jaxgpt.analysis.sweep import TPE, Halving, Sweep, log_uniform, uniform
from jaxgpt.errors import UserError


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
  c.schedule.warmup_steps = 10
  c.train.steps = 60
  c.eval.every = 20
  c.log.every = 20
  return c


def get_sweep(arg=""):
  if arg == "search":
    return Sweep(
      random={"optim.lr": log_uniform(1e-4, 1e-1), "optim.b2": uniform(0.8, 0.999)},
      samples=12,
      search=TPE(startup=6, batch=3),
    )
  if arg:
    raise UserError(f"lr_sweep.py:{arg}: the argument is search, or none")
  return Sweep(
    grid={"optim.lr": (1e-3, 4e-3, 16e-3, 64e-3)},
    seeds=(0, 1, 2),
    halving=Halving(steps=(20,), keep=0.5),
  )
