"""Question answering by a language model that writes the answer: from scratch, or pretrained.

  jaxgpt data --kind=seq2seq --out=DATA PAIRS...
  jaxgpt train --config=configs/tasks/generated_answers.py --workdir=RUN \
    --config.data.path=DATA

Start from a run, which may be imported, by naming its folder:
configs/tasks/generated_answers.py:RUN. DATA must then have its tokenizer:
jaxgpt data --tokenizer=RUN/tokenizer ...

Size:      from scratch 525 thousand parameters and the vocabulary,
           800 steps of 32 rows of 256 tokens.
"""

from jaxgpt.tasks import recipes


def get_config(arg=""):
  c = recipes.decoder(arg)
  if not arg:
    c.train.steps = 800
  c.data.seq_len = min(1024, c.model.max_len) if arg else 256
  c.data.batch_size = 16 if arg else 32
  c.eval.every = 200
  return c
