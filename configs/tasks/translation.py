"""Translation: a small decoder from scratch, or a pretrained language model.

  jaxgpt data --kind=seq2seq --out=DATA PAIRS...
  jaxgpt train --config=configs/tasks/translation.py --config.data.path=DATA --workdir=RUN

Start from a run, which may be imported, by naming its folder: configs/tasks/translation.py:RUN.
DATA must then have its tokenizer: jaxgpt data --tokenizer=RUN/tokenizer ...

Size:      from scratch 525 thousand parameters and the vocabulary,
           500 steps of 32 rows of 128 tokens.
"""

from jaxgpt.tasks import recipes


def get_config(arg=""):
  c = recipes.decoder(arg)
  if not arg:
    c.train.steps = 500
  c.data.seq_len = min(512, c.model.max_len) if arg else 128
  c.data.batch_size = 16 if arg else 32
  c.eval.every = 200
  return c
