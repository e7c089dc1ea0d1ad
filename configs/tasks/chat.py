"""Chat: a small model that answers from scratch, or a pretrained language model.

  jaxgpt data --kind=chat --out=DATA CONVERSATIONS...
  jaxgpt train --config=configs/tasks/chat.py --config.data.path=DATA --workdir=RUN

Start from a run, which may be imported, by naming its folder: configs/tasks/chat.py:RUN.
DATA must then have its tokenizer: jaxgpt data --tokenizer=RUN/tokenizer ...

Size:      from scratch 525 thousand parameters and the vocabulary,
           600 steps of 32 rows of 128 tokens.
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
    c.train.steps = 600
    c.schedule.warmup_steps = 50
  c.data.seq_len = min(1024, c.model.max_len) if arg else 128
  c.data.batch_size = 16 if arg else 32
  c.eval.every = 150
  c.mesh.data, c.mesh.fsdp = -1, 1
  return c
