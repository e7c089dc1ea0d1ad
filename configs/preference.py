"""Preference optimization: a language model learns which of two answers is better (DPO).

  jaxgpt data --kind=preference --out=DATA --tokenizer=RUN/tokenizer PAIRS...
  jaxgpt train --config=configs/preference.py:RUN --config.data.path=DATA --workdir=NEW

All parameters are trained, and the reference is RUN as it was. Other losses are values of
objective.loss. To train adapters only, add --config.model.lora.rank=16.

Size:      that of the run, 300 steps of 16 pairs of 512 tokens.
"""

from jaxgpt import config
from jaxgpt.run import run_folder


def get_config(arg=""):
  c = config.base()
  c.data.seq_len = 512
  if arg:
    run = run_folder.read_config(arg)
    c.model.update(run.model)
    c.init_from = arg
    c.data.seq_len = min(c.data.seq_len, run.model.max_len)
  c.objective.name = "preference"
  c.data.batch_size = 16
  c.optim.lr = 1e-6
  c.optim.weight_decay = 0.0
  c.schedule.name = "linear"
  c.schedule.warmup_steps = 30
  c.train.steps = 300
  c.eval.every = 50
  return c
