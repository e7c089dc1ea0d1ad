"""A text classifier: a small encoder from scratch, or a pretrained one such as bert_base.

  jaxgpt data --kind=classification --out=DATA LABELLED_TEXT...
  jaxgpt train --config=configs/classifier.py --config.data.path=DATA --workdir=RUN

Start from published weights in FOLDER by naming their preset. DATA must then be tokenized with
their tokenizer:

  jaxgpt train --config=configs/classifier.py:bert_base --config.init_from=FOLDER ...

Size:      from scratch 129 thousand parameters, 100 steps of 16 rows of 128 tokens.
Hardware:  2 CPU cores, about 10 s.
"""

from jaxgpt import config


def get_config(arg=""):
  c = config.base()
  if arg:
    c.model.update(config.preset(arg))
    c.optim.lr = 3e-5
    c.train.steps = 1000
    c.schedule.warmup_steps = 100
  else:
    c.model.update(
      dict(
        num_layers=2,
        width=64,
        num_heads=4,
        norm="layernorm",
        position="learned",
        max_len=128,
        activation="gelu",
        bias=True,
      )
    )
    c.optim.lr = 3e-3
    c.train.steps = 100
    c.schedule.warmup_steps = 10
  c.model.update(
    dict(
      causal=False,
      head="classifier",
      head_transform="tanh",
      head_bias=True,
      pooling="first" if arg else "mean",
      num_labels=2,
    )
  )
  c.objective.name = "classification"
  c.data.seq_len = 128
  c.data.batch_size = 16
  c.eval.every = 0
  c.mesh.data, c.mesh.fsdp = -1, 1
  return c
