"""Embeddings of texts, from pairs of a query and its positive: from scratch, or a pretrained model.

  jaxgpt data --kind=retrieval --out=DATA PAIRS...
  jaxgpt train --config=configs/tasks/retrieval.py --config.data.path=DATA --workdir=RUN

Start from a run, which may be imported, by naming its folder: configs/tasks/retrieval.py:RUN. DATA
must then have its tokenizer: jaxgpt data --tokenizer=RUN/tokenizer ...

Size:      from scratch 131 thousand parameters and the vocabulary,
           300 steps of 64 pairs of 64 tokens.
"""

from jaxgpt import config
from jaxgpt.run import run_folder


def get_config(arg=""):
  c = config.base()
  if arg:
    c.model.update(run_folder.read_config(arg).model)
    c.init_from = arg
    c.optim.lr = 3e-5
    c.optim.weight_decay = 0.01
    c.train.steps = 1000
    c.schedule.warmup_steps = 100
  else:
    c.model.update(
      dict(
        num_layers=2,
        width=64,
        num_heads=4,
        norm="rmsnorm",
        position="rotary",
        activation="silu",
        gated=True,
        bias=False,
        causal=False,
      )
    )
    c.optim.lr = 3e-3
    c.train.steps = 300
    c.schedule.warmup_steps = 20
  c.model.update(dict(head="none", head_transform="none"))
  c.model.pooling = "last" if c.model.causal else "mean"
  c.objective.name = "contrastive"
  c.objective.symmetric = True
  c.data.seq_len = 64
  c.data.batch_size = 64
  c.eval.every = 100
  c.mesh.data, c.mesh.fsdp = -1, 1
  return c
