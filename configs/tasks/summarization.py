"""Summarization: a small decoder from scratch, or a pretrained language model.

  jaxgpt data --kind=seq2seq --out=DATA PAIRS...
  jaxgpt train --config=configs/tasks/summarization.py --config.data.path=DATA --workdir=RUN

Start from a run, which may be imported, by naming its folder: configs/tasks/summarization.py:RUN.
DATA must then have its tokenizer: jaxgpt data --tokenizer=RUN/tokenizer ...

Size:      from scratch 525 thousand parameters and the vocabulary,
           1,200 steps of 8 rows of 256 tokens.
"""

from jaxgpt.tasks import recipes


def get_config(arg=""):
  c = recipes.decoder(arg)
  if not arg:
    c.optim.name = "muon"
    c.optim.lr = 5e-3
    c.train.steps = 1200
  c.data.seq_len = min(1024, c.model.max_len) if arg else 256
  c.data.batch_size = 16 if arg else 8
  c.eval.every = 600 if not arg else 200
  return c
