"""Sentiment, or other classes of a text: a small encoder from scratch, or a pretrained model.

  jaxgpt data --kind=classification --out=DATA LABELLED_TEXT...
  jaxgpt train --config=configs/tasks/sentiment.py --config.data.path=DATA --workdir=RUN

Start from a run, which may be imported, by naming its folder: configs/tasks/sentiment.py:RUN. DATA
must then have its tokenizer: jaxgpt data --tokenizer=RUN/tokenizer ...

Size:      from scratch 131 thousand parameters and the vocabulary,
           1,200 steps of 64 rows of 64 tokens.
"""

from jaxgpt.tasks import recipes


def get_config(arg=""):
  c = recipes.encoder(arg)
  if not arg:
    c.optim.lr = 2e-3
    c.train.steps = 1200
  c.model.update(dict(head="classifier", head_transform="none", num_labels=2))
  c.model.pooling = "last" if c.model.causal else "mean"
  c.model.label_names = ()
  c.objective.name = "classification"
  c.data.seq_len = 128 if arg else 64
  c.data.batch_size = 32 if arg else 64
  c.eval.every = 100
  return c
