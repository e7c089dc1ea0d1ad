"""Any number of labels per text: a small encoder from scratch, or a pretrained model.

  jaxgpt data --kind=multi_label --out=DATA LABELLED_TEXT...
  jaxgpt train --config=configs/tasks/multi_label.py --config.data.path=DATA \
      --config.model.num_labels=28 --workdir=RUN

Start from a run, which may be imported, by naming its folder: configs/tasks/multi_label.py:RUN.
DATA must then have its tokenizer: jaxgpt data --tokenizer=RUN/tokenizer ...

Size:      from scratch 131 thousand parameters and the vocabulary,
           300 steps of 32 rows of 128 tokens.
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
  c.model.update(dict(head="classifier", head_transform="none", head_bias=True, num_labels=2))
  c.model.pooling = "last" if c.model.causal else "mean"
  c.model.label_names = ()
  c.objective.name = "multi_label"
  c.data.seq_len = 128
  c.data.batch_size = 32
  c.eval.every = 100
  c.mesh.data, c.mesh.fsdp = -1, 1
  return c
