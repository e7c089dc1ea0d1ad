"""Chat: a small model that answers from scratch, or a pretrained language model.

  jaxgpt data --kind=chat --out=DATA CONVERSATIONS...
  jaxgpt train --config=configs/tasks/chat.py --config.data.path=DATA --workdir=RUN

Start from a run, which may be imported, by naming its folder: configs/tasks/chat.py:RUN.
DATA must then have its tokenizer: jaxgpt data --tokenizer=RUN/tokenizer ...

Size:      from scratch 525 thousand parameters and the vocabulary,
           600 steps of 32 rows of 128 tokens.
"""

from jaxgpt.tasks import recipes


def get_config(arg=""):
  c = recipes.decoder(arg)
  if not arg:
    c.train.steps = 600
  c.data.seq_len = min(1024, c.model.max_len) if arg else 128
  c.data.batch_size = 16 if arg else 32
  c.eval.every = 150
  return c
