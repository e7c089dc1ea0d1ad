"""Embeddings of texts, from pairs of a query and its positive: from scratch, or a pretrained model.

  jaxgpt data --kind=retrieval --out=DATA PAIRS...
  jaxgpt train --config=configs/tasks/retrieval.py --config.data.path=DATA --workdir=RUN

Start from a run, which may be imported, by naming its folder: configs/tasks/retrieval.py:RUN. DATA
must then have its tokenizer: jaxgpt data --tokenizer=RUN/tokenizer ...

Size:      from scratch 131 thousand parameters and the vocabulary,
           300 steps of 64 pairs of 64 tokens.
"""

from jaxgpt.tasks import recipes


def get_config(arg=""):
  c = recipes.encoder(arg)
  if not arg:
    c.train.steps = 300
  c.model.update(dict(head="none", head_transform="none"))
  c.model.pooling = "last" if c.model.causal else "mean"
  c.objective.name = "contrastive"
  c.objective.symmetric = True
  c.data.seq_len = 64
  c.data.batch_size = 64
  c.eval.every = 100
  return c
