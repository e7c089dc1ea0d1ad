"""Extractive question answering: a small encoder from scratch, or a pretrained model.

  jaxgpt data --kind=question_answering --split-by=title --out=DATA SQUAD.json
  jaxgpt train --config=configs/tasks/question_answering.py --config.data.path=DATA --workdir=RUN

Start from a run, which may be imported, by naming its folder:
configs/tasks/question_answering.py:RUN. DATA must then have its tokenizer:
jaxgpt data --tokenizer=RUN/tokenizer ...

Size:      from scratch 197 thousand parameters and the vocabulary,
           1,400 steps of 32 rows of 112 tokens.
"""

from jaxgpt.tasks import recipes


def get_config(arg=""):
  c = recipes.encoder(arg, num_layers=3)
  if not arg:
    c.train.steps = 1400
  c.model.update(dict(head="token_classifier", head_transform="none", head_bias=True, num_labels=2))
  c.model.label_names = ()
  c.objective.name = "question_answering"
  c.data.seq_len = 384 if arg else 112
  c.data.batch_size = 16 if arg else 32
  c.eval.every = 250
  return c
