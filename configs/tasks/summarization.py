"""Summarization: a small decoder from scratch, or a pretrained language model.

  jaxgpt data --kind=seq2seq --out=DATA PAIRS...
  jaxgpt train --config=configs/tasks/summarization.py --config.data.path=DATA --workdir=RUN

Start from a run, which may be imported, by naming its folder: configs/tasks/summarization.py:RUN.
DATA must then have its tokenizer: jaxgpt data --tokenizer=RUN/tokenizer ...

Size:      from scratch 525 thousand parameters and the vocabulary,
           500 steps of 16 rows of 256 tokens.
"""

from jaxgpt import config
from jaxgpt.run import run_folder


def get_config(arg=""):
  c = config.base()
  if arg:
    c.model.update(run_folder.read_config(arg).model)
    c.init_from = arg
    c.optim.lr = 2e-5
    c.optim.weight_decay = 0.0
    c.train.steps = 1000
    c.schedule.warmup_steps = 50
  else:
    c.model.update(
      dict(
        num_layers=2,
        width=128,
        num_heads=4,
        norm="rmsnorm",
        position="rotary",
        activation="silu",
        gated=True,
        bias=False,
      )
    )
    c.optim.lr = 3e-3
    c.train.steps = 500
    c.schedule.warmup_steps = 50
  c.data.seq_len = min(1024, c.model.max_len) if arg else 256
  c.data.batch_size = 16
  c.eval.every = 100
  c.mesh.data, c.mesh.fsdp = -1, 1
  return c
