"""A masked language model: a small encoder from scratch, or the further training of one.

  jaxgpt data --out=DATA TEXT...
  jaxgpt train --config=configs/masked_lm.py --config.data.path=DATA --workdir=RUN

Go on from a run, which may be imported, by naming its folder: configs/masked_lm.py:RUN. DATA must
then have its tokenizer: jaxgpt data --tokenizer=RUN/tokenizer ...

RUN is a start for the files in configs/tasks, such as configs/tasks/sentiment.py:RUN, which take
its layers and give it a new head.

Size:      from scratch 1.1 million parameters and the vocabulary,
           1,000 steps of 32 rows of 128 tokens.
"""

from jaxgpt import config
from jaxgpt.run import run_folder


def get_config(arg=""):
  c = config.base()
  if arg:
    c.model.update(run_folder.read_config(arg).model)
    c.init_from = arg
    c.optim.lr = 1e-4
  else:
    c.model.update(
      dict(
        num_layers=4,
        width=128,
        num_heads=4,
        norm="rmsnorm",
        position="rotary",
        activation="silu",
        gated=True,
        bias=False,
        causal=False,
        head_transform="norm",
        head_bias=True,
      )
    )
    c.optim.lr = 1e-3
  c.objective.name = "masked_lm"
  c.data.seq_len = 128
  c.data.batch_size = 32
  c.train.steps = 1000
  c.schedule.warmup_steps = 50
  c.eval.every = 200
  c.mesh.data, c.mesh.fsdp = -1, 1
  return c
