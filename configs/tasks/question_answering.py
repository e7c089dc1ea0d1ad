"""Extractive question answering: a small encoder from scratch, or a pretrained model.

  jaxgpt data --kind=question_answering --split-by=title --out=DATA SQUAD.json
  jaxgpt train --config=configs/tasks/question_answering.py --config.data.path=DATA --workdir=RUN

Start from a run, which may be imported, by naming its folder:
configs/tasks/question_answering.py:RUN. DATA must then have its tokenizer:
jaxgpt data --tokenizer=RUN/tokenizer ...

Size:      from scratch 197 thousand parameters and the vocabulary,
           1,400 steps of 32 rows of 112 tokens.
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
        num_layers=3,
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
    c.train.steps = 1400
    c.schedule.warmup_steps = 20
  c.model.update(dict(head="token_classifier", head_transform="none", head_bias=True, num_labels=2))
  c.model.label_names = ()
  c.objective.name = "question_answering"
  c.data.seq_len = 384 if arg else 112
  c.data.batch_size = 16 if arg else 32
  c.eval.every = 250
  c.mesh.data, c.mesh.fsdp = -1, 1
  return c
