"""Any number of labels per text: a small encoder from scratch, or a pretrained model.

  jaxgpt data --kind=multi_label --out=DATA LABELLED_TEXT...
  jaxgpt train --config=configs/tasks/multi_label.py --config.data.path=DATA \
      --config.model.num_labels=28 --workdir=RUN

Start from a run, which may be imported, by naming its folder: configs/tasks/multi_label.py:RUN.
DATA must then have its tokenizer: jaxgpt data --tokenizer=RUN/tokenizer ...

Size:      from scratch 131 thousand parameters and the vocabulary,
           300 steps of 32 rows of 128 tokens.
"""

from jaxgpt.tasks import recipes


def get_config(arg=""):
  c = recipes.encoder(arg)
  if not arg:
    c.train.steps = 300
  c.model.update(dict(head="classifier", head_transform="none", head_bias=True, num_labels=2))
  c.model.pooling = "last" if c.model.causal else "mean"
  c.model.label_names = ()
  c.objective.name = "multi_label"
  c.data.seq_len = 128
  c.data.batch_size = 32
  c.eval.every = 100
  return c
